"""Prometheus' own parsers for Python: the text format, and OpenMetrics, whose parser is strict."""

import urllib.request

from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client import parser as text

from seen import URL, seen


def scrape(accept):
    request = urllib.request.Request(f"{URL}/metrics", headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


# What Prometheus 2 sends.
SCRAPER = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
names = {}
for what, accept, parser, kind in [
    ("text format", "", text, "text/plain; version=0.0.4; charset=utf-8"),
    ("OpenMetrics", SCRAPER, openmetrics, "application/openmetrics-text; version=1.0.0; charset=utf-8"),
]:
    given, body = scrape(accept)
    seen(f"{what}: its type", given == kind, given)
    families = list(parser.text_string_to_metric_families(body))
    types = {family.name: family.type for family in families}
    seen(f"{what}: {len(families)} families", all(kind in ("counter", "gauge", "histogram") for kind in types.values()))
    names[what] = {(s.name, tuple(sorted(s.labels.items()))) for f in families for s in f.samples}
seen("both have the same series", names["text format"] == names["OpenMetrics"], len(names["OpenMetrics"]))
lost = ("ultraep_requests_total", (("outcome", "Lost"),))
seen("a series is there before its first event", lost in names["OpenMetrics"])
