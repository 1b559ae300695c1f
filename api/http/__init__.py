"""What every route shares: request context, admission, errors, metrics, streams, middlewares."""
