"""What follows a read of one token, put together by hand from its parts."""

import pytest
import torch
from torch import Tensor

from compiled.choose import UNFORCED, Choice, Eviction, Forced, Look, choose
from compiled.philox import key_of
from compiled.read import Reading, read
from compiled.sample import Sampling, SamplingMethod, sample, seen_tokens, surprises
from compiled.score import Brightness, Culling, Novelty, brighten, decide_cull, echo
from compiled.state import NOWHERE, Cursor, State
from toys import digest, toy_config, toy_cursor, toy_state, toy_weights

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLING = Sampling(
    temperature=torch.tensor(0.8),
    top_p=torch.tensor(0.9),
    min_p=torch.tensor(0.0),
    repetition_penalty=torch.tensor(1.2),
    key=key_of(3),
)
METHOD = SamplingMethod(top_k=20)
BRIGHTNESS = Brightness(decay=0.9, seeds=(9.0, 8.0, 7.0, 6.0, 5.0))
NOVELTY = Novelty(decay=0.75)
FORGETTING = Culling(target=8, sinks=1, recent=2)


def keep_score(state: State, look: Look) -> Tensor:
    return state.brightness - look.mass + state.lit


def situation(uncommitted: bool) -> tuple[State, Cursor, Reading]:
    config = toy_config()
    state = toy_state(config, 12, {slot: slot for slot in range(9)})
    cursor = toy_cursor(9 if uncommitted else 8, token=17)
    cursor.uncommitted.fill_(int(uncommitted))
    cursor.tick.fill_(41)
    cursor.source.fill_(3)
    cursor.surprise.fill_(1.25)
    cursor.novelty.fill_(2.5)
    one = torch.tensor(1)
    reading = read(
        config, toy_weights(config), state, cursor.token, cursor.position, one, bucket=12
    )
    return state, cursor, reading


def chosen(state: State, cursor: Cursor, reading: Reading, token: int = UNFORCED) -> Choice:
    forced = Forced(torch.tensor([token]), torch.tensor([2], dtype=torch.uint8))
    return choose(
        state,
        cursor,
        reading,
        SAMPLING,
        forced,
        method=METHOD,
        eviction=Eviction(BRIGHTNESS, NOVELTY, FORGETTING, keep_score),
    )


@pytest.mark.parametrize("uncommitted", [True, False])
@pytest.mark.parametrize("fed", [UNFORCED, 0, 33])
def test_a_choice_is_the_sum_of_its_parts(uncommitted: bool, fed: int) -> None:
    state, cursor, reading = situation(uncommitted)
    before = digest(*state, *cursor, *reading)
    choice = chosen(state, cursor, reading, fed)

    seen = seen_tokens(40, state.token_id, state.valid, cursor.token)
    spoken = int(sample(reading.logits[0], seen, cursor.tick, METHOD, SAMPLING))
    token = spoken if fed == UNFORCED else fed
    assert choice.token.tolist() == [token]
    assert torch.equal(choice.surprise, surprises(reading.logits, torch.tensor([token])))

    bright, lit = brighten(state, torch.tensor(42), reading.mass, BRIGHTNESS)
    assert torch.equal(choice.updates["brightness"], bright)
    assert torch.equal(choice.updates["lit"], lit)
    strength = torch.tensor((1 - NOVELTY.decay) * 1.25 * uncommitted)
    assert torch.equal(
        choice.updates["novelty"], echo(state, cursor.position[0], strength, NOVELTY)
    )
    cull, culled = decide_cull(state, cursor, bright - reading.mass + lit, FORGETTING)
    assert torch.equal(choice.cull, cull)
    assert torch.equal(choice.culled, culled)
    assert NOWHERE not in culled.tolist()

    rows = choice.rows
    assert rows["token_id"].tolist() == [17]
    assert rows["position"].tolist() == cursor.position.tolist()
    assert rows["brightness"].tolist() == [6.0]  # the seed of its source
    assert rows["surprise"].tolist() == [1.25]
    assert rows["source"].tolist() == [3]
    assert rows["novelty"].tolist() == [2.5]
    assert rows["born"].tolist() == rows["lit"].tolist() == [42]
    assert rows["pinned"].tolist() == [False]
    assert int(choice.length) == int(uncommitted)

    following = choice.cursor
    assert following.token.tolist() == [token]
    assert following.position.tolist() == [int(cursor.position) + 1]
    assert torch.equal(following.surprise, choice.surprise)
    running = NOVELTY.decay * 2.5 + (1 - NOVELTY.decay) * float(choice.surprise)
    assert float(following.novelty) == pytest.approx(running, rel=1e-6)
    assert following.source.tolist() == [2]
    assert int(following.uncommitted) == 1
    assert int(following.tick) == 42
    assert digest(*state, *cursor, *reading) == before


def test_a_choice_shares_no_memory_with_what_the_patch_will_write() -> None:
    state, cursor, reading = situation(True)
    plan = chosen(state, cursor, reading).plan(reading)
    written = {tensor.untyped_storage().data_ptr() for tensor in (*state, *cursor)}
    tensors = [
        plan.keys,
        plan.values,
        *plan.rows.values(),
        plan.length,
        plan.cull,
        *plan.updates.values(),
    ]
    tensors += plan.cursor
    assert not any(tensor.untyped_storage().data_ptr() in written for tensor in tensors)
    assert plan.keys is reading.new_keys
    assert plan.values is reading.new_values
    assert set(plan.updates) == {"brightness", "lit", "novelty"}
