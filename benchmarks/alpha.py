"""Which point of the line: LDS along it, what criteria without retraining would choose, and how far each falls short of the best point.

    python benchmarks/alpha.py --setting sst2 --model bert-mini --job W/text/full --ground_truth results/ground_truth_text.parquet \\
        --output results/alpha_text.json

The job is one that `path.py` has been run on. At each α, training rows and queries are featurized once. The criteria see the run, and the
queries' outputs before and after training, and no retraining:

- prediction: how well the sums of a query's scores rank what training did to its output, f(final) − f(base) (Spearman over queries);
- evidence: the marginal likelihood of that change on the training rows, under a Gaussian process with the point's kernel;
- doubt: the point whose mean 1 − p is nearest to a half.

All points share one sketch, so that nothing but the point differs; the members of an index have a sketch each. `lds_shortfall` is the LDS of the best single point of this grid less that of the choice, paired over subsets.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from estimators import SIZE, combine, influences
from featurize import write
from lds_setting import as_row
from path import Run, parser_of_a_run

from hf_trak import Featurizer, TrakConfig
from hf_trak.evaluation import spearman
from hf_trak.linalg import DEFAULT_DAMPING
from hf_trak.members import DEFAULT_ALPHAS

ALPHAS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)


class Point(NamedTuple):
    """Features, outputs and Q of training rows and queries at one point."""

    train: np.ndarray
    queries: np.ndarray
    train_output: np.ndarray
    query_output: np.ndarray
    train_q: np.ndarray

    def influences(self) -> np.ndarray:
        return influences(self.train, self.queries)


def point_at(arguments: dict[str, Any], train: Dataset, queries: Dataset) -> Point:
    featurizer = Featurizer(config=TrakConfig(proj_dim=SIZE, label_mapping="by_id"), device="cpu", **arguments)
    featurizer.measure_statistics(train)
    featurizer.check(train)
    featurizer.choose_engine(train)
    sides = []
    for rows in (train, queries):
        batches = [featurizer.collate(rows[begin : begin + 16]) for begin in range(0, len(rows), 16)]
        found = [featurizer.features(batch) for batch in batches]
        sides.append([torch.cat(values).double().numpy() for values in zip(*found, strict=True)])
    (train_output, train_q, train_features), (query_output, _, query_features) = sides
    return Point(train_features, query_features, train_output, query_output, train_q)


def prediction(point: Point, change: np.ndarray) -> float:
    """Return the rank correlation of the queries' summed scores with what training did to their outputs."""
    sums = (point.influences() * point.train_q[:, None]).sum(0)
    return float(spearman(sums[:, None], change[:, None])[0])


def evidence(point: Point, change: np.ndarray) -> float:
    """Return the log marginal likelihood per row of the training rows' change, with the best scale of the kernel."""
    kernel = point.train @ point.train.T
    n = len(kernel)
    kernel = kernel / (np.trace(kernel) / min(n, SIZE)) + DEFAULT_DAMPING * np.eye(n)
    quadratic = change @ np.linalg.solve(kernel, change) / n
    return float(-0.5 * np.log(quadratic) - 0.5 * np.linalg.slogdet(kernel)[1] / n)


def main() -> None:
    options = parser_of_a_run(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    train, queries, judge, epochs, base = Run.load(options)
    final = epochs[-1]
    start = point_at({"model": final, "base": base, "alpha": 0.0}, train, queries)
    case = f"{options.setting}, one point of the line, {SIZE} numbers a row"
    rows: list[dict[str, Any]] = []
    points: dict[float, Point] = {}
    for alpha in ALPHAS:
        points[alpha] = point_at({"model": final, **({"base": base, "alpha": alpha} if alpha < 1 else {})}, train, queries)
        print(f"α = {alpha:g}", flush=True)
    query_change = points[1.0].query_output - start.query_output
    train_change = points[1.0].train_output - start.train_output
    lds, criteria = {}, {}
    for alpha, point in points.items():
        lds[alpha] = judge([combine([point.influences()], [point.train_q])])
        criteria[alpha] = {
            "prediction": prediction(point, query_change),
            "evidence": evidence(point, train_change),
            "doubt": -abs(float(point.train_q.mean()) - 0.5),
        }
        rows.append(as_row(case, f"α = {alpha:g}", lds[alpha], doubt=float(point.train_q.mean()), **{
            f"criterion_{name}": value for name, value in criteria[alpha].items() if name != "doubt"
        }))  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    members = [points[alpha] for alpha in DEFAULT_ALPHAS]
    default = judge([combine([point.influences() for point in members], [point.train_q for point in members])])
    best = max(lds, key=lambda alpha: lds[alpha][0])
    choices = {f"the best single point, α = {best:g}": lds[best]}
    for name in ("prediction", "evidence", "doubt"):
        chosen = max(criteria, key=lambda alpha, name=name: criteria[alpha][name])
        choices[f"chosen by {name}, α = {chosen:g}"] = lds[chosen]
    choices["always α = 0.5"] = lds[0.5]
    choices[f"the points α = {', '.join(f'{alpha:g}' for alpha in DEFAULT_ALPHAS)} together (the default)"] = default
    for method, values in choices.items():
        rows.append(as_row(case, method, values))
        rows.append(as_row(case, method, lds[best] - values, metric="lds_shortfall"))
        print(json.dumps(rows[-1]), f"{values[0]:.3f}", flush=True)
    write(options, rows, command=f"python benchmarks/alpha.py --setting {options.setting}")


if __name__ == "__main__":
    main()
