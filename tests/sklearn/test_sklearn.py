"""The estimators of softjax.sklearn, compared with scikit-learn's LogisticRegression."""

import pickle
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")

import scipy.sparse
import sklearn
from flowers import RNG, TWO, WEIGHTS, D, N, X, Y, fitted, frame
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import ConvergenceWarning, UnsetMetadataPassedError
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    ShuffleSplit,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from softjax import regression
from softjax.sklearn import SoftmaxClassifier, SoftmaxClassifierCV

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def peer(**options):
    return LogisticRegression(tol=1e-12, max_iter=100_000, **options)


@pytest.mark.parametrize("y", [Y, TWO], ids=["three classes", "two classes"])
@pytest.mark.parametrize(
    "options",
    [
        {"C": 0.3},
        {"C": 3.0, "class_weight": "balanced"},
        {"C": 2.0, "l1_ratio": 0.3},
        {"C": 1.5, "fit_intercept": False},
    ],
    ids=["l2", "balanced", "elastic net", "no intercept"],
)
def test_fits_are_those_of_logistic_regression(y, options):
    weights = WEIGHTS if "class_weight" in options else None
    solver = {"solver": "saga"} if "l1_ratio" in options else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = peer(**options, **solver).fit(X, y, weights)
    ours = fitted(y, weights, **options)
    assert ours.coef_.dtype == ours.intercept_.dtype == np.float64  # with 64-bit types off
    assert ours.classes_.tolist() == expected.classes_.tolist()
    # What is left is the tolerance of the peer.
    np.testing.assert_allclose(ours.coef_, expected.coef_, rtol=0, atol=2e-4)
    np.testing.assert_allclose(ours.intercept_, expected.intercept_, rtol=0, atol=2e-4)
    np.testing.assert_allclose(ours.predict_proba(X), expected.predict_proba(X), atol=2e-4)
    np.testing.assert_allclose(ours.decision_function(X), expected.decision_function(X), atol=2e-3)
    assert ours.predict(X).tolist() == expected.predict(X).tolist()
    assert ours.score(X, y) == expected.score(X, y)
    assert jax.config.jax_enable_x64 is False


@pytest.mark.parametrize("y", [Y, TWO], ids=["three classes", "two classes"])
def test_parameters_are_those_of_regression_fit(y):
    """C is 1 / (l2 sum w), and for two classes, whose kernel has two columns, half of l2 counts."""
    ours = fitted(y, WEIGHTS, C=0.7)
    labels = np.unique(y, return_inverse=True)[1]
    l2 = (2 if y is TWO else 1) / (0.7 * WEIGHTS.sum())
    assert ours.l2_ == pytest.approx(l2)
    with jax.enable_x64(True):
        result = regression.fit(X, labels, l2=l2, sample_weights=WEIGHTS, tol=1e-10)
        kernel, bias = map(np.asarray, result.params)
        objective = regression.objective(ours.params_, X, labels, l2=l2, sample_weights=WEIGHTS)
    np.testing.assert_allclose(ours.params_.kernel, kernel, atol=1e-8)
    np.testing.assert_allclose(ours.params_.bias, bias - bias.mean(), atol=1e-7)
    assert float(objective) == pytest.approx(ours.objective_, rel=1e-12)
    same = fitted(y, WEIGHTS, l2=l2)
    np.testing.assert_allclose(same.coef_, ours.coef_, rtol=1e-12)


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "coo_array"])
def test_sparse_features_stay_sparse(kind, classifier, monkeypatch):
    def dense(self, *args, **kwargs):
        raise AssertionError("made dense")

    for name in ("csr_matrix", "csr_array", "csc_array", "coo_array", "coo_matrix"):
        for method in ("toarray", "todense"):
            monkeypatch.setattr(getattr(scipy.sparse, name), method, dense)
    features = getattr(scipy.sparse, kind)(X)
    ours = SoftmaxClassifier().fit(features, Y)
    np.testing.assert_allclose(ours.coef_, classifier.coef_, atol=1e-7)
    np.testing.assert_allclose(ours.predict_proba(features), classifier.predict_proba(X), atol=1e-7)


def test_a_lasso_of_sparse_features_is_that_of_dense_ones():
    """To the digits that the default tolerance gives."""
    options = {"l1_ratio": 1.0, "C": 2.0, "fit_intercept": False}
    dense, ours = (SoftmaxClassifier(**options).fit(x, Y) for x in (X, scipy.sparse.csr_array(X)))
    np.testing.assert_array_equal(ours.coef_ == 0, dense.coef_ == 0)
    np.testing.assert_allclose(ours.coef_, dense.coef_, rtol=1e-7)


def test_float32_stays_float32(classifier):
    ours = SoftmaxClassifier().fit(X.astype(np.float32), Y)
    assert ours.coef_.dtype == ours.predict_proba(X.astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(ours.coef_, classifier.coef_, atol=1e-4)


def test_probabilities_are_accurate_at_the_ends(classifier):
    """The log of what rounds to 1, and of what underflows to 0."""
    confident = clone(classifier).fit(X, Y)
    confident.coef_ = np.array([[0.0] * D, [0.0] * D, [1.0, 0, 0, 0]])
    confident.intercept_ = np.zeros(3)
    rows = np.zeros((2, D))
    rows[:, 0] = [40.0, -1000.0]
    logs = confident.predict_log_proba(rows)
    np.testing.assert_allclose(logs[0, 2], -2 * np.exp(-40.0), rtol=1e-12)
    np.testing.assert_allclose(logs[1], [-np.log(2), -np.log(2), -1000 - np.log(2)], rtol=1e-14)
    assert len(confident.predict_proba(np.zeros((65, D)))) == 65


def test_pipelines_searches_and_copies(classifier):
    table = frame().assign(colour=np.where(WEIGHTS > 1, "red", "blue"))
    columns = ColumnTransformer(
        [
            ("scale", StandardScaler(), list("abcd")),
            ("code", OneHotEncoder(drop="if_binary", sparse_output=False), ["colour"]),
        ]
    ).set_output(transform="pandas")
    pipeline = make_pipeline(columns, SoftmaxClassifier())
    grid = {"softmaxclassifier__C": [0.01, 1.0]}
    search = GridSearchCV(pipeline, grid, cv=3, scoring="neg_log_loss").fit(table, Y)
    assert search.best_params_ == {"softmaxclassifier__C": 1.0}
    best = search.best_estimator_[-1]
    assert best.feature_names_in_.tolist()[-1] == "code__colour_red"
    features = {row["feature"] for row in best.summary().rows}
    assert features == {*best.feature_names_in_, "bias"}
    scores = cross_val_score(SoftmaxClassifier(), X, Y, cv=3)
    assert scores.mean() > 0.6
    calibrated = CalibratedClassifierCV(SoftmaxClassifier(), cv=3).fit(X, Y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(1), 1)
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.predict_proba(X), classifier.predict_proba(X))
    assert clone(classifier).get_params() == classifier.get_params()
    assert not hasattr(clone(classifier), "coef_")


def test_a_lasso_selects_all_features_of_the_model():
    lasso = SoftmaxClassifier(C=0.05, l1_ratio=1.0)
    kept = SelectFromModel(lasso).fit(X, Y).get_support()
    np.testing.assert_array_equal(kept, lasso.fit(X, Y).coef_.any(0))
    assert 0 < kept.sum() < D
    assert [SoftmaxClassifierCV(l1_ratio=r).penalty for r in (0.0, 0.5)] == ["l2", "elasticnet"]


@pytest.mark.parametrize("scale", [1e-16, 1e-27, 1e-100])
def test_a_tiny_feature_changes_no_fit(scale):
    """A penalty that is far larger than its squares leaves it out of the model, at any solver."""
    tiny = np.column_stack([X, scale * WEIGHTS])
    for solver, table in (("auto", tiny), ("lbfgs", tiny), ("auto", scipy.sparse.csr_array(tiny))):
        ours = SoftmaxClassifier(solver=solver).fit(table, Y)
        assert ours.stop_reason_ == "converged"
        np.testing.assert_allclose(ours.coef_[:, :D], fitted().coef_, atol=1e-8)
        rounding = np.finfo(np.float64).eps * np.abs(ours.coef_).max()
        assert np.abs(ours.coef_[:, D]).max() <= scale * N + rounding
    scores = [SoftmaxClassifierCV(Cs=[0.1, 1.0], cv=3).fit(x, Y).scores_ for x in (tiny, X)]
    np.testing.assert_allclose(*scores, rtol=1e-8)


def test_metadata_are_routed_to_fits_and_scores():
    offset = RNG.normal(size=(N, 3))
    metadata = {"sample_weight": WEIGHTS, "offset": offset}

    def routed(**options):
        model = SoftmaxClassifier(**options).set_fit_request(sample_weight=True, offset=True)
        return model.set_score_request(sample_weight=True, offset=True)

    with sklearn.config_context(enable_metadata_routing=True):
        search = GridSearchCV(routed(), {"C": [0.1, 1.0]}, cv=3).fit(X, Y, **metadata)
        validated = cross_validate(
            routed(), X, Y, cv=3, params=metadata, return_estimator=True, return_indices=True
        )
        scaler = StandardScaler().set_fit_request(sample_weight=True)
        pipeline = make_pipeline(scaler, routed().set_predict_proba_request(offset=True))
        p = pipeline.fit(X, Y, **metadata).predict_proba(X, offset=offset)
        with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
            cross_validate(SoftmaxClassifier(), X, Y, cv=3, params={"sample_weight": WEIGHTS})
    alone = fitted(Y, WEIGHTS, offset, C=search.best_params_["C"])
    np.testing.assert_array_equal(search.best_estimator_.coef_, alone.coef_)
    folds = zip(validated["estimator"], validated["indices"]["test"], strict=True)
    for (model, test), score in zip(folds, validated["test_score"], strict=True):
        train = np.setdiff1d(np.arange(N), test)
        own = SoftmaxClassifier().fit(X[train], Y[train], WEIGHTS[train], offset[train])
        np.testing.assert_array_equal(model.coef_, own.coef_)
        assert score == own.score(X[test], Y[test], WEIGHTS[test], offset[test])
    scaled = StandardScaler().fit(X, sample_weight=WEIGHTS).transform(X)
    by_hand = SoftmaxClassifier().fit(scaled, Y, WEIGHTS, offset)
    np.testing.assert_array_equal(p, by_hand.predict_proba(scaled, offset))


def test_a_fit_that_has_not_converged_warns_and_says_why():
    with pytest.warns(ConvergenceWarning, match="'step limit' after 1 step: .*`max_iter`"):
        assert fitted(max_iter=1).n_iter_.tolist() == [1]
    apart = np.sort(X[:, 0]) > 0
    with pytest.warns(ConvergenceWarning, match="'separated' after .* smaller `C`"):
        SoftmaxClassifier(C=np.inf).fit(np.sort(X, axis=0), apart)
    firth = SoftmaxClassifier(C=np.inf, solver="firth").fit(np.sort(X, axis=0), apart)
    assert firth.stop_reason_ == "converged"


def test_a_warm_start_continues(classifier):
    ours = clone(classifier).set_params(warm_start=True).fit(X, Y)
    assert ours.fit(X, Y).n_iter_ <= 1
    np.testing.assert_allclose(ours.coef_, classifier.coef_, atol=1e-9)
    ours.set_params(fit_intercept=False).fit(X, Y)
    assert not ours.intercept_.any()
    ours.set_params(fit_intercept=True)
    ours.fit(X, TWO)  # of another shape: from zeros
    np.testing.assert_allclose(ours.coef_, fitted(TWO).coef_, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": ["a"] * N}, "only one class: 'a'"),
        ({"sample_weight": np.zeros(N)}, "non-zero"),
        ({"sample_weight": -WEIGHTS}, "[Nn]egative"),
        ({"X": np.where(X > 3, np.nan, X)}, "NaN"),
        ({"y": X[:, 0]}, "continuous"),
        ({"y": [*Y[:-1], None]}, "Input y contains None among texts: a label is missing"),
        ({"y": [None, *Y[1:]]}, "Input y contains None among texts: a label is missing"),
        ({"y": np.ma.array(Y, mask=X[:, 3] > 1)}, "Input y contains None"),
        ({"X": np.ma.array(X, mask=X > 3)}, "Input X contains NaN"),
        ({"C": 0}, "'C' parameter"),
        ({"class_weight": {"rose": -1.0}}, "class_weight must be finite and >= 0"),
        ({"solver": "saga"}, "'solver' parameter"),
        ({"solver": "firth"}, "penalty of its own"),
        ({"l2": 0.1, "l1_ratio": 0.5}, "l1_ratio divides"),
        ({"solver": "lbfgs", "l1_ratio": 0.5}, "proximal"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    data = {"X": X, "y": Y, "sample_weight": None}
    options = {name: value for name, value in change.items() if name not in data}
    data |= {name: value for name, value in change.items() if name in data}
    with pytest.raises(ValueError, match=message):
        SoftmaxClassifier(**options).fit(**data)


def test_cross_validation_chooses_the_penalty():
    ours = SoftmaxClassifierCV(Cs=[10.0, 0.01, 1.0], cv=3).fit(X, Y, WEIGHTS)
    assert ours.Cs_.tolist() == [0.01, 1.0, 10.0]
    best = ours.scores_.mean(0).argmax()
    assert ours.Cs_[best] == ours.C_
    alone = fitted(sample_weight=WEIGHTS, C=ours.C_)
    np.testing.assert_allclose(ours.coef_, alone.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.coefs_paths_[best], ours.coef_)
    # A fold by hand: the same penalty of the mean loss.
    groups = np.arange(N) % 3
    splits = list(GroupKFold(3).split(X, Y, groups))
    by_hand = SoftmaxClassifierCV(Cs=[1.0], cv=splits).fit(X, Y, WEIGHTS)
    grouped = SoftmaxClassifierCV(Cs=[1.0], cv=GroupKFold(3)).fit(X, Y, WEIGHTS, groups=groups)
    np.testing.assert_array_equal(grouped.scores_, by_hand.scores_)
    train, test = splits[0]
    fold = SoftmaxClassifier(l2=by_hand.l2_).fit(X[train], Y[train], WEIGHTS[train])
    loss = log_loss(Y[test], fold.predict_proba(X[test]), sample_weight=WEIGHTS[test])
    assert by_hand.scores_[0, 0] == pytest.approx(-loss, rel=1e-6)
    assert by_hand.summary().rows[0]["feature"] == "x0"


def test_a_balanced_class_without_weight_takes_no_part():
    """Its factor, 1 / 0, multiplies weights of 0; the others are those of scikit-learn."""
    weights = np.where(Y == "rose", 0.0, 1.0)
    names, counts = np.unique(Y, return_counts=True)
    factors = dict(zip(names, weights.sum() / (3 * counts), strict=True))
    with pytest.warns(ConvergenceWarning, match="a class has no weight, for which none does"):
        ours = SoftmaxClassifier(class_weight="balanced").fit(X, Y, weights)
    with pytest.warns(ConvergenceWarning):
        by_hand = SoftmaxClassifier(class_weight=factors).fit(X, Y, weights)
    np.testing.assert_allclose(ours.coef_, by_hand.coef_, atol=1e-7)


def test_cross_validation_with_one_standard_error_and_accuracy():
    options = {"Cs": 4, "cv": 3, "scoring": "accuracy"}
    best = SoftmaxClassifierCV(**options).fit(X, TWO)
    simple = SoftmaxClassifierCV(**options, selection="one_standard_error").fit(X, TWO)
    assert simple.C_ <= best.C_
    assert best.scores_.max() <= 1
    assert best.coefs_paths_.shape == (4, 1, D)
    lasso = SoftmaxClassifierCV(**options, l1_ratio=1.0).fit(X, TWO)
    assert not lasso.coefs_paths_[0].any()
    assert lasso.coefs_paths_[-1].all()
    alone = SoftmaxClassifier(C=lasso.C_, l1_ratio=1.0).fit(X, TWO)
    np.testing.assert_allclose(lasso.coef_, alone.coef_, atol=1e-5)
    bare = SoftmaxClassifierCV(**options, fit_intercept=False).fit(X, TWO)
    assert not bare.intercept_.any()
    rows = np.arange(N)
    for cv in (
        ShuffleSplit(5, test_size=0.5),
        [(rows, rows[:20])],  # the fit would be to the test set, too
        [(np.append(rows[20:], rows[20:]), rows[:20])],  # each row twice
    ):
        with pytest.raises(ValueError, match="disjoint test sets"):
            SoftmaxClassifierCV(cv=cv).fit(X, Y)
    with pytest.raises(ValueError, match="Cs must be numbers > 0"):
        SoftmaxClassifierCV(Cs=[1.0, -1.0]).fit(X, Y)


def test_an_offset_is_a_known_part_of_the_logits():
    """The first feature, held at coefficients that are known, in the fit and in the predictions."""
    weak = SoftmaxClassifier(C=1e6).fit(X, Y)
    known = X[:, :1] @ weak.coef_[:, :1].T
    ours = SoftmaxClassifier(C=1e6).fit(X[:, 1:], Y, offset=known)
    np.testing.assert_allclose(ours.coef_, weak.coef_[:, 1:], atol=1e-4)
    np.testing.assert_allclose(
        ours.predict_proba(X[:, 1:], offset=known), weak.predict_proba(X), atol=1e-4
    )
    assert ours.predict(X[:, 1:], known).tolist() == weak.predict(X).tolist()
    assert ours.score(X[:, 1:], Y, offset=known) == weak.score(X, Y)
    assert ours.summary().text == ours.summary(X[:, 1:], Y, offset=known).text
    two = SoftmaxClassifier().fit(X, TWO, WEIGHTS, offset=np.log(1 + WEIGHTS))
    both = np.stack([0 * WEIGHTS, np.log(1 + WEIGHTS)], 1)
    np.testing.assert_allclose(two.coef_, fitted(TWO, WEIGHTS, offset=both).coef_, rtol=1e-9)
    moved = two.decision_function(X, np.log(1 + WEIGHTS)) - two.decision_function(X)
    np.testing.assert_allclose(moved, np.log(1 + WEIGHTS), rtol=1e-6)
    chosen = SoftmaxClassifierCV(Cs=[1.0], cv=3).fit(X, TWO, WEIGHTS, offset=both)
    np.testing.assert_allclose(chosen.coef_, two.coef_, atol=1e-6)
    with pytest.raises(ValueError, match=r"offset must be of shape \(90, 3\), got shape \(90,\)"):
        SoftmaxClassifier().fit(X, Y, offset=WEIGHTS)
    with pytest.raises(ValueError, match="Input offset contains NaN"):
        two.predict(X, np.full(N, np.nan))


def test_without_scikit_learn_the_import_names_the_extra():
    program = """if True:
        import sys
        sys.modules["sklearn"] = None
        try:
            import softjax.sklearn
        except ModuleNotFoundError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'softjax-regression[sklearn]'" in done.stdout
