"""The model: everything that needs torch. Imports nothing of the server, so that it runs alone on a bare machine."""
