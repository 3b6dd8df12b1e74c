"""Fact tracing: which training sentences taught a model its facts, and are they the ones that an attribution method names?

```python
ftrace = load_ftrace("ftrace_lama")
queries, candidates = load_candidates(Path("ftrace_lama/candidates_200.json.gz"), ftrace.abstracts, ftrace.queries)
scores = score_candidates(BM25PlusSentences(), ftrace.abstracts, queries, candidates)
measure(scores, candidates, sentence_numbers(ftrace.abstracts))["mrr"].mean()
```

`hf-trak evaluate ftrace` does all of it: fine-tune, rank, remove, fine-tune again.
"""

from hf_trak.evaluation.fact_tracing.answers import beams, fine_tune_learned, is_right
from hf_trak.evaluation.fact_tracing.candidates import Candidates, draw_candidates, load_candidates, save_candidates
from hf_trak.evaluation.fact_tracing.choice import best_variant, cross_fit, halves
from hf_trak.evaluation.fact_tracing.counterfactual import Answers, Forgetting, run_forgetting, summarize_forgetting
from hf_trak.evaluation.fact_tracing.data import FTrace, load_ftrace, sentence_numbers
from hf_trak.evaluation.fact_tracing.embed import Embed
from hf_trak.evaluation.fact_tracing.encoding import EncodedRows, Encoder
from hf_trak.evaluation.fact_tracing.fine_tuning import FineTuning, fine_tune
from hf_trak.evaluation.fact_tracing.measuring import measure, result_rows, score_candidates
from hf_trak.evaluation.fact_tracing.methods import BM25PlusSentences, Random, RandomTarget
from hf_trak.evaluation.fact_tracing.output import fact_task
from hf_trak.evaluation.fact_tracing.proponents import Fact, find_proponents, parse_facts
from hf_trak.evaluation.fact_tracing.published import published_rows
from hf_trak.evaluation.fact_tracing.ranking import rank_measures, to_sentences
from hf_trak.evaluation.fact_tracing.run import run_ftrace
from hf_trak.evaluation.fact_tracing.settings import SCALES, FTraceArguments
from hf_trak.evaluation.fact_tracing.tracin import TracIn, Variant
from hf_trak.evaluation.fact_tracing.trak import Trak

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
