"""The native text routes: bodies, answers and handlers; `service.py` names the routes."""
