"""What Akyürek et al. (2022) print: anchors beside our own figures, of another model (mT5-base) and another corpus (FTRACE-TREx).

Fine-tuned model, fine-tune-learned queries, sentence level; mean over three seeds and its deviation. Their layers and normalization
are chosen on the queries they report. Source: [Towards tracing factual knowledge in language models back to the training
data](https://huggingface.co/papers/2205.11482), tables 2 to 6. TRAK's own figures on FTRACE are not known to us.
"""

from __future__ import annotations

from typing import Any

CASE = "PUBLISHED, another model and corpus: Akyürek et al. 2022, mT5-base, FTRACE-TREx, fine-tune-learned queries"

_PERCENT = {
    # method: (MRR, its deviation, recall at 10, its deviation)
    "Random-Target": (14.50, 0.95, 10.32, 1.54),
    "BM25+": (77.55, 1.50, 60.89, 2.31),
    "TracIn": (48.56, 4.40, 56.02, 0.67),
    "EMBED": (64.29, 1.32, 57.89, 1.38),
    "TracIn + EMBED": (58.52, 3.83, 61.72, 0.08),
}


def published_rows() -> list[dict[str, Any]]:
    """Return the published figures as result rows, in shares; `deviation` is over seeds, and no interval is known."""
    rows = []
    for method, (mrr, mrr_deviation, recall, recall_deviation) in _PERCENT.items():
        for metric, value, deviation in (("mrr", mrr, mrr_deviation), ("recall_at_10", recall, recall_deviation)):
            rows.append(
                {
                    "case": CASE,
                    "method": method,
                    "metric": metric,
                    "value": round(value / 100, 6),
                    "unit": "share",
                    "interval": None,
                    "deviation": round(deviation / 100, 6),
                    "level": "sentence",
                    "published": True,
                }
            )
    return rows
