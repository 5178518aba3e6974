"""The page to drive: what it asks is answered, bad questions are refused in one line, and in a
browser each mode answers and a driven dream moves."""

import base64
import http.client
import io
import json
import re
import shutil
import subprocess
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from flow import MODES
from sample import SHIPPED, Policy
from scripts import play
from scripts.play import HOST, JSON, PAGE, Question, answer
from worlds.tabletop import Tabletop

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def policy():
    # A thread of the server answers, in which no device that is not there is seen.
    return Policy.load(SHIPPED, device="cpu")


@pytest.fixture
def server(policy):
    with ThreadingHTTPServer((HOST, 0), play.Handler) as server:
        server.policy = policy
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pixels(url: str) -> np.ndarray:
    """The films (n, F, H, W, 3) of a picture."""
    kind, _, data = url.partition(",")
    assert kind == "data:image/webp;base64"
    rows = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    height, width, _ = rows.shape
    films = rows.reshape(height // 48, 48, width // 48, 48, 3)
    return films.transpose(0, 2, 1, 3, 4).astype(int)


def script(name: str, page: Path = PAGE) -> object:
    """The json that a page holds."""
    (text,) = re.findall(
        f'<script id="{name}" type="application/json">(.*?)</script>', page.read_text(), re.S
    )
    return json.loads(text)


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_answers_with_every_euler_step(policy, mode):
    """Both times run as the table of the modes says, with the film and the actions at each."""
    found = answer(policy, Question(mode, steps=2, seed=3))
    runs = {"denoise": [1, 0.5, 0], "noise": [1, 1, 1], "given": [0, 0, 0]}
    assert found["times"] == [
        runs[MODES[mode].video],
        runs[MODES[mode].action],
    ]
    films = pixels(found["dream"])
    actions = np.array(found["actions"])
    assert films.shape == (3, 5, 48, 48, 3) and actions.shape == (3, 12, 3)
    moved = np.abs(films[2, 1:] - films[0, 1:]).mean()
    assert (moved > 10) == (MODES[mode].video == "denoise")
    assert (actions[2] != actions[0]).any() == (MODES[mode].action == "denoise")
    assert np.abs(films[:, 0] - films[2, 0]).mean() < 4  # the observation stays


def test_the_last_step_is_what_the_policy_predicts(policy):
    """Bit for bit the actions of `Policy.predict`, and up to the picture's losses its film."""
    found = answer(policy, Question("joint", steps=3, seed=5))
    world = Tabletop(1, split="eval")
    seen = world.reset([5])
    policy.mode = "joint"
    policy.steps = 3
    policy.generator.manual_seed(5)
    actions, video = policy.predict(seen["image"], seen["state"], seen["instruction"])
    assert np.array_equal(np.float32(found["actions"][-1]), actions[0])
    assert np.abs(pixels(found["dream"])[-1] - video[0]).mean() < 3


def test_the_simulator_obeys_what_the_mode_is_given(policy):
    """Driven actions: few are held; then what was done is where the next question goes on."""
    found = answer(policy, Question("world_model", steps=1, seed=7, actions=[[1, -1, 1]]))
    world = Tabletop(1, split="eval")
    world.reset([7])
    for _ in range(12):
        world.advance(np.array([[1.0, -1.0, 1.0]]))
    assert found["obeyed"] == [[1, -1, 1]] * 12
    assert np.allclose(found["state"], world.state()[0])
    film = pixels(found["film"])[0]
    assert np.abs(film[-1] - world.render()[0]).mean() < 3
    further = answer(policy, Question("idm", steps=1, seed=7, done=found["obeyed"]))
    assert np.abs(pixels(further["film"])[0, 0] - film[-1]).mean() < 3


def test_a_dream_follows_the_actions_it_is_told(policy):
    """The same observation and noise: two actions are two dreams; the same ones, the same dream."""
    left, right, again = (
        answer(policy, Question("world_model", steps=2, seed=4, actions=[[x, 0, -1]]))["dream"]
        for x in (-1, 1, -1)
    )
    assert left == again
    assert np.abs(pixels(left)[-1, -1] - pixels(right)[-1, -1]).max() > 20


def test_another_instruction_is_what_the_policy_is_told(policy):
    """In the same world, with the same noise."""
    own = answer(policy, Question("vla", steps=1))
    other = answer(policy, Question("vla", steps=1, instruction="push the red disc to the left"))
    assert other["instruction"] == "push the red disc to the left" != own["instruction"]
    assert other["actions"][-1] != own["actions"][-1] and other["goal"] == own["goal"]


# -- the page -------------------------------------------------------------------------------------


def test_the_page_says_what_the_modes_are():
    assert script("meanings") == {name: list(mode) for name, mode in MODES.items()}
    assert {one["question"]["mode"] for one in script("examples")} == MODES.keys()
    for one in script("examples"):
        Question.of(one["question"])


def test_the_recorded_page_is_the_page_with_answers(policy, tmp_path, monkeypatch):
    """Examples that go on begin where the one before ended."""
    short = [{"question": {"mode": "vla", "steps": 1}}, {"question": {"mode": "vgm"}, "on": 1}]
    page = tmp_path / "play.html"
    page.write_text(f"<b>{play.EXAMPLES}{json.dumps(short)}</script>")
    monkeypatch.setattr(play, "PAGE", page)
    monkeypatch.setattr(Policy, "load", lambda ckpt: policy)
    play.main(["--record", str(tmp_path / "new")])
    first, second = script("examples", tmp_path / "new" / "index.html")
    assert second["question"]["done"] == first["answer"]["obeyed"]
    assert second["answer"] == answer(policy, Question.of(second["question"]))


def test_a_film_shows_one_observation_under_three_actions(policy, tmp_path, monkeypatch):
    """All six columns begin alike; the simulator's end apart."""
    seen = {}
    monkeypatch.setattr(play, "film", lambda path, columns, caption: seen.update(columns))
    play.told(policy, tmp_path / "told.gif")
    first = [video[0].astype(int) for video in seen.values()]
    assert len(first) == 6 and all(np.abs(one - first[0]).mean() < 12 for one in first)
    left, right, up = (seen[f"truly {name}"][-1].astype(int) for name in ("left", "right", "up"))
    assert min(np.abs(a - b).max() for a, b in ((left, right), (left, up), (right, up))) > 60


def test_the_committed_recording_is_of_this_page():
    """`python -m scripts.play --record docs` wrote it, and it is small."""
    recorded = ROOT / "docs" / "index.html"
    bare = [
        re.sub('(?s)(id="examples".*?>).*?(</script>)', r"\1\2", path.read_text())
        for path in (recorded, PAGE)
    ]
    assert bare[0] == bare[1]
    for new, old in zip(script("examples", recorded), script("examples"), strict=True):
        new["question"].pop("done")
        assert new["question"] == old["question"] and new["answer"]["dream"]
    assert recorded.stat().st_size < 1_500_000


# -- the server -----------------------------------------------------------------------------------


def send(server, method="POST", path="/ask", body="{}", **headers):
    """Status and text of an answer."""
    headers = {"Content-Type": JSON} | {name.replace("_", "-"): v for name, v in headers.items()}
    link = http.client.HTTPConnection(HOST, server.server_port, timeout=60)
    link.request(method, path, body, headers)
    reply = link.getresponse()
    return reply.status, reply.read().decode()


def test_the_server_sends_the_page_and_answers(server, policy):
    assert server.server_address[0] == "127.0.0.1"
    assert send(server, "GET", "/", None) == (200, PAGE.read_text())
    status, text = send(server, body='{"mode": "vla", "steps": 1, "seed": 2}')
    assert status == 200
    assert json.loads(text) == answer(policy, Question("vla", 1, 2))


@pytest.mark.parametrize(
    "body, message",
    [
        ("{", "question: not valid json"),
        ("[]", "question: is list, expected a json object"),
        ('{"mode": 1}', "mode is 1; expected a json str"),
        ('{"mode": "fly"}', "mode is 'fly'; expected one of joint"),
        ('{"steps": 0}', "question steps is 0; expected a whole number in [1,100]"),
        ('{"steps": 101}', "question steps is 101; expected"),
        ('{"steps": true}', "question steps is True; expected"),
        ('{"seed": -1}', "question seed is -1; expected"),
        ('{"seed": 1e3}', "question seed is 1000; expected"),
        ('{"randomized": 1}', "randomized is 1; expected a json bool"),
        ('{"sped": 1}', "question: unknown key 'sped' for Question; did you mean 'seed'?"),
        ('{"instruction": null}', "instruction is None; expected a json str"),
        (json.dumps({"instruction": "go " * 50}), "instruction is go go"),
        ('{"instruction": "\\ud800"}', "'utf-8' codec can't encode character"),
        ('{"done": [[0, 0]]}', "done is [[0, 0]]; expected at most 2000 rows of 3 numbers"),
        ('{"done": [[0, 0, 1.5]]}', "done is [[0, 0, 1.5]]; expected"),
        ('{"done": [["a", {}, 0]]}', "done is [['a', {}, 0]]; expected"),
        (json.dumps({"done": [[10**400, 0, 0]]}), "done is [[1000"),
        (json.dumps({"done": [[0, 0, 0]] * 2001}), "done is [[0, 0, 0]"),
        ('{"mode": "idm", "actions": [[NaN, 0, 0]]}', "question: not valid json: NaN"),
        (json.dumps({"mode": "idm", "actions": [[0, 0, 0]] * 13}), "actions is [[0, 0, 0]"),
    ],
)
def test_a_bad_question_is_one_json_error(server, body, message):
    status, text = send(server, body=body)
    error = json.loads(text)["error"]
    assert status == 400 and error.startswith(message) and "\n" not in error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"Host": "evil.example"}, "Host is evil.example; expected 127.0.0.1 or"),
        ({"method": "GET", "path": "/", "Host": "evil.example:80"}, "Host is evil.example:80"),
        ({"method": "GET", "path": "/../presets.toml"}, "GET /../presets.toml is not here"),
        ({"path": "/"}, "POST / is not here; expected application/json for /ask"),
        ({"Content_Type": "text/plain"}, "POST /ask is not here"),
        ({"Content_Length": "-1"}, "Content-Length is -1; expected 0 to 200000"),
        ({"Content_Length": "200001"}, "Content-Length is 200001; expected"),
        ({"Content_Length": "many"}, "Content-Length is many; expected"),
    ],
)
def test_a_bad_request_is_one_json_error(server, change, message):
    """From elsewhere, for something else, or of no size."""
    status, text = send(server, **change)
    assert status == 400 and json.loads(text)["error"].startswith(message)


def test_a_method_that_is_none_is_a_json_error_too(server):
    status, text = send(server, "PUT", "/", "")
    assert status == 501 and json.loads(text) == {"error": "Unsupported method ('PUT')"}


def test_a_busy_port_ends_the_command_in_one_line(server, policy, monkeypatch):
    monkeypatch.setattr(Policy, "load", lambda ckpt: policy)
    port = server.server_port
    message = f"--port {port}: Address already in use; name another"
    with pytest.raises(ValueError, match=re.escape(message)):
        play.main(["--port", str(port)])


# -- a browser ------------------------------------------------------------------------------------

# In the page: every mode is asked, then the world model is driven by the mouse and by a key.
DRIVER = """<script>
const faults = [], seen = {}
addEventListener("error", event => faults.push(event.message))
addEventListener("unhandledrejection", event => faults.push(String(event.reason)))
const until = async test => { while (!test()) await new Promise(good => setTimeout(good, 50)) }
const idle = () => !busy && !waiting && !stroke && last
const hidden = document.createElement("canvas").getContext("2d", {willReadFrequently: true})
const dreamt = () => {
  hidden.drawImage(last.dream, 4 * 48, 48 * (last.actions.length - 1), 48, 48, 0, 0, 48, 48)
  return [...hidden.getImageData(0, 0, 48, 48).data]
}
const apart = (a, b) => a.reduce((sum, v, i) => sum + Math.abs(v - b[i]), 0) / a.length
const at = (x, y) => {
  const box = $("world").getBoundingClientRect()
  return {bubbles: true, clientX: box.left + x * box.width, clientY: box.top + y * box.height}
}
async function drive(x, y) {
  const before = question.done.length
  $("world").dispatchEvent(new PointerEvent("pointerdown", at(0.5, 0.5)))
  dispatchEvent(new PointerEvent("pointermove", at(x, y)))
  await until(() => question.done.length > before && idle())
  dispatchEvent(new PointerEvent("pointerup"))
  await until(idle)
  return dreamt()
}
async function run() {
  await until(idle)
  for (const button of $("modes").children) {
    const before = last
    button.click()
    await until(() => idle() && last !== before)
    seen[button.value] = [$("note").className, last.times, $("strip").naturalHeight]
  }
  $("modes").children[2].click()
  await until(idle)
  const still = dreamt(), left = await drive(0, 0.5), state = last.state
  const right = await drive(1, 0.5)
  const moved = [apart(still, left), apart(left, right)]
  seen.driven = [...moved, state[0], last.state[0], question.done.length]
  $("world").focus()
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowUp", bubbles: true}))
  await until(() => stroke)
  await until(idle)
  document.body.dispatchEvent(new KeyboardEvent("keyup", {key: "ArrowUp", bubbles: true}))
  seen.keyed = last.obeyed.at(-1)
}
run().catch(error => faults.push(String(error))).then(() => {
  const report = document.createElement("pre")
  report.textContent = JSON.stringify({faults, seen})
  document.body.append(report)
})
</script>"""


def browse(url: str) -> tuple[str, str]:
    """The page after a minute of its own time, and what the browser logged."""
    flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom"
    words = [CHROMIUM, *flags.split(), "--virtual-time-budget=60000", "--window-size=1100,900", url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=540)
    return done.stdout, "\n".join(re.findall(".*CONSOLE.*", done.stderr))


needs_browser = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")


@pytest.mark.slow
@needs_browser
def test_in_a_browser_each_mode_answers_and_a_driven_dream_moves(server, tmp_path, monkeypatch):
    """By mouse and by key, without an error in the console."""
    page = tmp_path / "play.html"
    page.write_text(PAGE.read_text().replace("</html>", DRIVER + "</html>"))
    monkeypatch.setattr(play, "PAGE", page)
    text, logged = browse(f"http://127.0.0.1:{server.server_port}/")
    found = json.loads(re.search("<pre>(.*?)</pre>", text, re.S)[1])
    assert found["faults"] == [] and logged == ""
    seen = found["seen"]
    for mode in MODES:
        kind, times, height = seen[mode]
        assert kind == "" and len(times[0]) == 11 and height == 11 * 48
    dreamt_left, changed, left, right, done = seen["driven"]
    assert dreamt_left > 0.5 and changed > 0.5
    assert left < right - 0.3 and done == 24
    assert seen["keyed"][1] < 0


@pytest.mark.slow
@needs_browser
def test_the_recorded_page_needs_no_server():
    text, logged = browse((ROOT / "docs" / "index.html").as_uri())
    assert logged == "" and "python -m scripts.play" in text
    assert re.search('<i id="tv" style="--t: ?0%;?">', text)  # it has played to its end
