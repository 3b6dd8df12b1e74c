"""A synthetic FTRACE of a dozen people, in the columns of the real one: each fact is stated by two sentences, masked in two ways."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

TOWNS = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi")
JOBS = ("painter", "singer", "chemist", "pilot")
_SENTENCES = {
    "P19": ("{s} was born in {o} .", "{o} is where {s} was born ."),
    "P106": ("{s} is a {o} .", "The {o} {s} is known ."),
}
_TEMPLATES = {"P19": "{s} was born in <extra_id_0> .", "P106": "{s} is a <extra_id_0> ."}


def synthetic_ftrace(n_people: int = 12, *, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Return abstracts and queries."""
    generator = np.random.default_rng(seed)
    abstracts, queries = [], []
    for person in range(n_people):
        subject, subject_uri = f"Person{person} Name{person % 5}", f"Q{100 + person}"
        for predicate, objects in (("P19", TOWNS), ("P106", JOBS)):
            number = int(generator.integers(len(objects)))
            target, uri = objects[number], f"Q{number + (10 if predicate == 'P19' else 20)}"
            for form in _SENTENCES[predicate]:
                for kind, masked, answer in (("object", "o", target), ("subject", "s", subject)):
                    words = {"s": subject, "o": target, masked: "<extra_id_0>"}
                    abstracts.append(
                        {
                            "inputs_pretokenized": form.format(**words),
                            "targets_pretokenized": f"<extra_id_0> {answer}",
                            "masked_uri": uri if kind == "object" else subject_uri,
                            "masked_type": kind,
                            "facts": f"{predicate},{uri},{subject_uri}",
                            "id": str(len(abstracts)),
                            "example_uris": "",
                            "page_uri": "",
                        }
                    )
            queries.append(
                {
                    "inputs_pretokenized": _TEMPLATES[predicate].format(s=subject),
                    "targets_pretokenized": f"<extra_id_0> {target}",
                    "obj_surface": target,
                    "sub_surface": subject,
                    "obj_uri": uri,
                    "sub_uri": subject_uri,
                    "predicate_id": predicate,
                    "uuid": f"query-{len(queries)}",
                }
            )
    return Dataset.from_list(abstracts), Dataset.from_list(queries)
