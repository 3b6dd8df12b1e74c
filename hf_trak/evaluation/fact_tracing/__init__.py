"""Fact tracing: which training sentences taught a model its facts, and are they the ones that an attribution method names?

```python
ftrace = load_ftrace("ftrace_lama")
queries, candidates = load_candidates(Path("ftrace_lama/candidates_200.json.gz"), ftrace.abstracts, ftrace.queries)
scores = score_candidates(BM25PlusSentences(), ftrace.abstracts, queries, candidates)
measure(scores, candidates, sentence_numbers(ftrace.abstracts))["mrr"].mean()
```

`hf-trak evaluate ftrace` does all of it: fine-tune, rank, remove, fine-tune again.
"""

from hf_trak.evaluation.fact_tracing.counterfactual import Answers, Forgetting, run_forgetting, summarize_forgetting
from hf_trak.evaluation.fact_tracing.data import (
    Candidates,
    Fact,
    FTrace,
    draw_candidates,
    find_proponents,
    load_candidates,
    load_ftrace,
    parse_facts,
    save_candidates,
    sentence_numbers,
)
from hf_trak.evaluation.fact_tracing.fine_tuning import FineTuning, beams, fine_tune, fine_tune_learned, is_right
from hf_trak.evaluation.fact_tracing.methods import BM25PlusSentences, Embed, Random, RandomTarget, TracIn, Variant
from hf_trak.evaluation.fact_tracing.ranking import (
    best_variant,
    cross_fit,
    halves,
    measure,
    rank_measures,
    result_rows,
    score_candidates,
    to_sentences,
)
from hf_trak.evaluation.fact_tracing.rankings import Trak
from hf_trak.evaluation.fact_tracing.run import published_rows, run_ftrace
from hf_trak.evaluation.fact_tracing.settings import SCALES, FTraceArguments
from hf_trak.evaluation.fact_tracing.task import EncodedRows, Encoder, fact_task

__all__ = [
    "SCALES",
    "Answers",
    "BM25PlusSentences",
    "Candidates",
    "Embed",
    "EncodedRows",
    "Encoder",
    "FTrace",
    "FTraceArguments",
    "Fact",
    "FineTuning",
    "Forgetting",
    "Random",
    "RandomTarget",
    "TracIn",
    "Trak",
    "Variant",
    "beams",
    "best_variant",
    "cross_fit",
    "draw_candidates",
    "fact_task",
    "find_proponents",
    "fine_tune",
    "fine_tune_learned",
    "halves",
    "is_right",
    "load_candidates",
    "load_ftrace",
    "measure",
    "parse_facts",
    "published_rows",
    "rank_measures",
    "result_rows",
    "run_forgetting",
    "run_ftrace",
    "save_candidates",
    "score_candidates",
    "sentence_numbers",
    "summarize_forgetting",
    "to_sentences",
]
