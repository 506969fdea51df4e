"""How long `cai-ray --help` takes, and what it imports.

python benchmarks/help.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

HEAVY = ("ray", "torch", "vllm", "transformers", "deepspeed", "numpy", "pyarrow", "pandas", "pydantic")
IMPORTED = """
import json, sys
sys.argv = ["cai-ray", "--help"]
from cai_ray.cli import main
try:
    main()
except SystemExit:
    pass
print("\\n" + json.dumps(sorted(m for m in sys.modules if "." not in m)))
"""


def main() -> None:
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cai_ray", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    done = subprocess.run([sys.executable, "-c", IMPORTED], check=True, capture_output=True, text=True)
    modules = json.loads(done.stdout.splitlines()[-1])
    print(
        json.dumps(
            {
                "benchmark": "help",
                "seconds": round(statistics.median(seconds), 3),
                "slowest": round(max(seconds), 3),
                "modules": len(modules),
                "heavy": [m for m in HEAVY if m in modules],
            }
        )
    )


if __name__ == "__main__":
    main()
