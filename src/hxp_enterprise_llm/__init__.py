"""The import paths of the HXP-Enterprise LLM Server; everything is citadel_gateway's."""
