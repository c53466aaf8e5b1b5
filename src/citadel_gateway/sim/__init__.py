"""Simulated engines: honest stand-ins for language-model servers."""

from __future__ import annotations

from citadel_gateway.sim.app import SimulatedEngine, create_engine_app
from citadel_gateway.sim.faults import AbortConnection, Fault, FaultKind
from citadel_gateway.sim.ledger import Ending, Entry
from citadel_gateway.sim.profile import PROFILES, EngineProfile, profile_for

__all__ = [
    "PROFILES",
    "AbortConnection",
    "Ending",
    "EngineProfile",
    "Entry",
    "Fault",
    "FaultKind",
    "SimulatedEngine",
    "create_engine_app",
    "profile_for",
]
