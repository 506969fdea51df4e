"""Policy and critic of a run behind one address: the OpenAI API, and what the constitution says.

`ingress.py` is the one way in (routes, errors), `auth.py` guards it, `critic.py` holds the feedback model's engine and
the reward model, `app.py` puts them together on Ray Serve.
"""

from cai_ray.serve.app import serve
from cai_ray.serve.auth import read_token

__all__ = ["read_token", "serve"]
