"""The router: one address before many servers. See `launch.py`; `docs/recipes.md` shows it in use."""
