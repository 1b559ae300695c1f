"""The native routes: bodies, responses and handlers; `service.py` names the routes."""
