"""How the HTTP worker and the ranks talk: messages, framing, the rank spec, process set-up."""
