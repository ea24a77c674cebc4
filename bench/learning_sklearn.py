"""Learning with scikit-learn's logistic regression; its epoch is the whole fit."""

import time

import numpy as np
import scipy.sparse
from learning import logloss
from sklearn.linear_model import LogisticRegression


def fit(side, data, seed, c):
    def matrix(indices, values):
        rows = np.repeat(np.arange(len(indices)), indices.shape[1])
        shape = (len(indices), data.num_features)
        return scipy.sparse.csr_matrix((values.ravel().astype(np.float64), (rows, indices.ravel())), shape)

    def predict(*x):
        return model.predict_proba(matrix(*x))[:, 1]

    inputs, labels = data.of("train")
    start = time.perf_counter()
    model = LogisticRegression(C=c, max_iter=1000).fit(matrix(*inputs), labels)
    seconds = time.perf_counter() - start
    inputs, labels = data.of("validation")
    return predict, [logloss(labels, predict(*inputs))], [seconds]
