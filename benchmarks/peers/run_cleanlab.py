"""cleanlab's recipe for label errors: out-of-sample probabilities of a logistic regression on embeddings, and its quality scores.

    python benchmarks/peers/run_cleanlab.py case.npz scores.npy

`case.npz` has `embeddings` and `given`; the result is -1 times each row's label quality (self-confidence), so that the more suspicious a
row, the higher. Five folds, stratified, as in cleanlab's tutorials for text and tabular data.
"""

import sys

import numpy as np
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

case = np.load(sys.argv[1])
model = LogisticRegression(max_iter=1000)
probabilities = cross_val_predict(model, case["embeddings"], case["given"], cv=5, method="predict_proba")
np.save(sys.argv[2], -get_label_quality_scores(case["given"], probabilities, method="self_confidence"))
