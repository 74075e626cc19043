from m2l.training.validation import EarlyStopping


def after(losses, minimum_improvement=0.0):
    stopping = EarlyStopping()
    for number, loss in enumerate(losses, start=1):
        stopping = stopping.updated(10 * number, loss, minimum_improvement)
    return stopping


def test_the_best_step_is_that_of_the_lowest_loss():
    assert after([3.0, 2.0, 2.5]) == EarlyStopping(2.0, 20, 1)


def test_an_equal_loss_is_no_improvement():
    assert after([2.0, 2.0]) == EarlyStopping(2.0, 10, 1)


def test_what_improves_by_less_than_the_minimum_does_not_count_but_adds_up():
    assert after([2.0, 1.95, 1.89], 0.1) == EarlyStopping(1.89, 30, 0)
    assert after([2.0, 1.95, 1.91], 0.1) == EarlyStopping(2.0, 10, 2)


def test_a_run_is_over_when_its_patience_is():
    stopping = after([2.0, 2.0, 2.0])
    assert [stopping.is_over(patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]
