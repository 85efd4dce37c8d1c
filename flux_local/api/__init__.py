"""HTTP: routes, authentication, errors as answers. Everything it serves is decided elsewhere."""
