"""The wire: typed bodies, routes, streams, errors, admission and middlewares over the runners."""
