"""Serves a run's policies and critic behind one address: the OpenAI API, and answers by the constitution.

A request passes the guard (`guard.py`, with `keys.py`), reaches a route (`api.py`, `ingress.py`), and is answered by a
deployment: a policy (`policy.py`), or the critic and the reward model (`critic.py`), which use the server's current
constitution (`constitutions.py`). `schemas.py` declares the requests, `answers.py` the answers, `errors.py` the errors.
`app.py` puts all of it on Ray Serve.
"""
