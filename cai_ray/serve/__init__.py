"""Policies and critic of a run behind one address: the OpenAI API, and what the constitution says.

`ingress.py` is the one way in (routes, errors), `guard.py` stands before it (`keys.py`), `policy.py` is Ray Serve LLM's
deployment, `critic.py` holds the feedback model's engine and the reward model, `constitutions.py` what they ask by,
`page.py` the page to try them, and `app.py` puts it all on Ray Serve.
"""
