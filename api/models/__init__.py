"""What routes call: the served models, with admission, deadlines and metrics of their requests."""
