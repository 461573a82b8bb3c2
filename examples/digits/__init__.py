"""Composed deployments over real data: `app.py` is the application, `demo.py` puts it to work."""
