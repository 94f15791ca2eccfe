"Differences: against scipy, against the plain sums, and by simulation whether intervals cover what they say."
import numpy as np
import pytest
from scipy import stats

from attnpool.registry import BadInput
from attnpool.report.difference import MARGIN, Difference, crossed, forest, holm, over_sets, paired
from attnpool.report.page import write_report
from attnpool.report.stats import format_table, summarize
from attnpool.runs.spec import make_spec
from attnpool.runs.store import Result

RNG = np.random.default_rng(3)


def as_dict(v): return dict(enumerate(v))


@pytest.mark.parametrize("n", [2, 5, 40])
def test_paired_is_the_t_test(n):
    a, b = RNG.normal(.9, .01, (2, n))
    d, its = paired(as_dict(a), as_dict(b)), stats.ttest_rel(a, b)
    assert d.p == pytest.approx(its.pvalue) and d.n == n
    for level in (.9, .95, .99): assert d.interval(level) == pytest.approx(tuple(its.confidence_interval(level)))


@pytest.mark.parametrize("mean, sd", [(0, .003), (.003, .002), (.02, .01), (-.004, .001), (.0049, .004)])
def test_as_good_as_is_two_one_sided_tests(mean, sd):
    for _ in range(20):
        v = RNG.normal(mean, sd, 9)
        both = max(stats.ttest_1samp(v, -MARGIN, alternative="greater").pvalue,
                   stats.ttest_1samp(v, MARGIN, alternative="less").pvalue)
        d = paired(as_dict(v), as_dict(0 * v))
        assert ("as good as" in d.verdict()) == (both < .05)
        assert ("better" in d.verdict()) == (stats.ttest_1samp(v, 0).pvalue < .05 and v.mean() > 0)
        assert d.verdict().startswith("cannot tell") == (both >= .05 and d.p >= .05)


def test_a_wider_variance_where_seeds_share_pictures():
    a, b = RNG.normal(.9, .01, (2, 12))
    plain, split = paired(as_dict(a), as_dict(b)), paired(as_dict(a), as_dict(b), ratio=.25)
    assert (split.error / plain.error)**2 == pytest.approx((1 / 12 + .25) / (1 / 12))   # Nadeau and Bengio, 2003


def test_seen_is_the_power_of_the_test():
    d, shifted = Difference(0, .01, 9, 10), 0
    effect, n = d.seen(), 20000
    v = RNG.normal(effect, .01 * 10**.5, (n, 10))
    shifted = (stats.ttest_1samp(v, 0, axis=1).pvalue < .05).mean()
    assert shifted == pytest.approx(.8, abs=.03)


def test_pairs_are_by_seed_and_one_pair_has_no_interval():
    d = paired({1: .5, 2: .6, 7: 1.}, {2: .5, 1: .3, 9: 0.})
    assert d.mean == pytest.approx(.15) and d.n == 2
    one = paired({1: .5}, {1: .4})
    assert one.mean == pytest.approx(.1) and np.isnan(one.error) and one.verdict() == "cannot tell with 1" and np.isnan(one.p)
    none = paired({1: .5}, {2: .4})
    assert none.n == 0 and none.verdict() == ""


def answers(part, picture, rest, n=8, pictures=60, true=0.):
    return (true + RNG.normal(0, part, (n, 1)) + RNG.normal(0, picture, (1, pictures)) + RNG.normal(0, rest, (n, pictures)))


@pytest.mark.parametrize("sizes", [(1, 0, 1), (0, 1, 1), (.3, 1, 2), (1, 5, 1), (0, 0, 1)])
def test_crossed_intervals_cover_the_truth_at_least_as_often_as_they_say(sizes):
    hits = [low <= .7 <= high for low, high in
            (crossed(answers(*sizes, true=.7), np.zeros((8, 60))).interval() for _ in range(400))]
    assert np.mean(hits) > .92   # 95% but for chance: below .92 once in 300 tries


def test_crossed_is_unbiased_in_its_variance():
    part, picture, rest, n, pictures = .3, 1., 2., 8, 60
    found = [crossed(answers(part, picture, rest), np.zeros((n, pictures))) for _ in range(600)]
    true = part**2 / n + picture**2 / pictures + rest**2 / (n * pictures)
    assert np.var([d.mean for d in found]) == pytest.approx(true, rel=.2)
    assert np.mean([d.error**2 for d in found]) == pytest.approx(true, rel=.1)


@pytest.mark.parametrize("a, b", [(np.ones((1, 9)), np.ones((1, 9))), (np.ones((3, 9)), np.ones((3, 8))), (np.ones(9), np.ones(9))])
def test_tables_that_do_not_fit_are_told(a, b):
    with pytest.raises(BadInput, match="^b: expected two tables"): crossed(a, b)


def test_over_sets_given_and_as_a_sample():
    each = [Difference(m, e, 9, 10) for m, e in ((.01, .002), (.03, .004), (.02, .001))]
    sample, given = over_sets(each), over_sets(each, given=True)
    its = stats.ttest_1samp([.01, .03, .02], 0)
    assert sample.p == pytest.approx(its.pvalue) and sample.interval() == pytest.approx(tuple(its.confidence_interval()))
    parts = np.array([.002, .004, .001])**2
    assert given.error == pytest.approx(parts.sum()**.5 / 3) and given.mean == sample.mean == pytest.approx(.02)
    assert given.dof == pytest.approx(parts.sum()**2 / (parts**2 / 9).sum())
    with pytest.raises(BadInput, match="^each: expected the differences of two data sets"): over_sets(each[:1])


def test_welch_for_two_sets_is_scipys():
    a, b = RNG.normal(.1, .1, 7), RNG.normal(.2, .4, 12)
    d = over_sets([paired(as_dict(a), as_dict(0 * a)), paired(as_dict(-b), as_dict(0 * b))], given=True)
    its = stats.ttest_ind(a, b, equal_var=False)
    assert d.p == pytest.approx(its.pvalue) and d.dof == pytest.approx(its.df)


def test_holm_by_hand_and_without_those_not_made():
    np.testing.assert_allclose(holm([.01, .04, .03, np.nan]), [.03, .06, .06, np.nan])
    np.testing.assert_allclose(holm([.6, .7]), [1, 1])
    assert holm([]).shape == (0,)


def test_the_picture_has_each_row_where_it_belongs():
    import matplotlib
    matplotlib.use("agg")
    from matplotlib.figure import Figure
    rows = {"one": Difference(.01, .002, 9, 10), "two": Difference(-.02, .004, 9, 10)}
    ax = forest(rows, Figure().subplots())
    points = [line.get_xydata()[0] for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points, [(1, 0), (-2, 1)])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one", "two"]


def test_a_report_says_as_good_as_and_what_that_is(tmp_path):
    results = [Result(make_spec("digits", head, seed=s, lr=1e-3), "complete", dict(accuracy=.9 + s / 100 + shift * (s % 3 - 1)), "accuracy")
               for head, shift in (("avg", 0), ("slim", .001), ("concat", .02)) for s in range(9)]
    text = format_table(summarize(results)).set_index("head").verdict
    assert list(text) == ["–", "as good as", "cannot tell with 9"]
    for some, there in ((results, True), (results[:9] + results[18:], False)):
        page = write_report(some, tmp_path / "report.html")
        assert ("As good as: less than half a point apart" in page.with_suffix(".md").read_text()) == there
        assert "two one-sided tests" in page.read_text() and ("<td>as good as</td>" in page.read_text()) == there
