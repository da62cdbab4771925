from benchmarks.harness.turns import take_turns


def test_arms_run_in_turns_and_keep_their_order() -> None:
    """Every arm runs once a turn, in the order given, and its readings are kept turn by turn."""
    ran: list[str] = []

    def arm(name: str):
        def run() -> dict[str, float]:
            ran.append(name)
            return {"step": float(len(ran))}

        return run

    turns = take_turns({"a": arm("a"), "b": arm("b")}, 2)
    assert ran == ["a", "b", "a", "b"]
    assert turns == {"a": [{"step": 1.0}, {"step": 3.0}], "b": [{"step": 2.0}, {"step": 4.0}]}


def test_a_warm_up_runs_and_does_not_count(capsys) -> None:
    """With a warm-up each arm runs once more, first, and its readings of that turn are dropped."""
    readings = iter(({"step": 9.0}, {"step": 1.0}))
    assert take_turns({"a": lambda: next(readings)}, 1, warm_up=True) == {"a": [{"step": 1.0}]}
    assert capsys.readouterr().out.splitlines() == ["Warming up", "Turn 1 of 1"]


def test_a_turn_without_readings_is_left_out() -> None:
    """An arm that gave nothing in a turn has one reading less; one that never gave any has none."""
    answers = iter((None, {"step": 2.0}))
    turns = take_turns({"killed once": lambda: next(answers), "always killed": lambda: None}, 2)
    assert turns == {"killed once": [{"step": 2.0}], "always killed": []}
