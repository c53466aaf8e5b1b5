"""The whole gateway in simulated time, against engines and clients that fail by a seeded script.

A seed is drawn into a scenario (:mod:`.draw`): a configuration, a fleet with its misfortunes, a
crowd of clients.  :mod:`.world` plays it, in virtual time and with a seeded scheduler: the gateway
is the real one from the bytes of its clients to the bytes of its engines, over Unix sockets that
never leave the process (:mod:`.wires`).  Then :mod:`.invariants` hold what :mod:`.clients` saw and
:mod:`.engines` did against each other, the log and the metrics.  :mod:`.planted` bugs show what
would be found.

A new option of the gateway is drawn in :mod:`.draw`; what it promises becomes a function in
:mod:`.invariants`, and a way to break the promise one in :mod:`.planted`.

``python -m tests.sim --seed N`` replays a run and prints its history.
"""
