"""What every check here starts from: the server's address, key and model, and a line for each thing seen."""

import os

URL = os.environ["ULTRAEP_URL"]
KEY = os.environ["ULTRAEP_API_KEY"]
MODEL = os.environ["ULTRAEP_MODEL"]
CONTEXT = int(os.environ["ULTRAEP_CONTEXT"])


def seen(what, good, shown=""):
    """Says what was seen; ends the check when it is not as it must be."""
    print(f"  {'ok' if good else 'WRONG'}  {what}{': ' if shown != '' else ''}{shown}", flush=True)
    if not good:
        raise SystemExit(1)
