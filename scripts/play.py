"""A page on which to drive the tabletop, and to see beside it what a policy imagines, mode by mode.

    python -m scripts.play                     serves the page to this machine alone
    python -m scripts.play --record docs       writes docs/index.html, recorded: it needs no server,
                                               and a film, docs/told.gif

The page is play.html. It posts questions (`Question`) to /ask, and each is answered by itself: the
world of a seed is led through all that was done so far, a mode is asked, and the simulator obeys
the same actions. So nothing is kept between two questions, and one always has the same answer.

Shapes: S actions of a chunk, F frames after the observation, K Euler steps, H W pixels.
"""

import base64
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from einops import rearrange
from numpy import ndarray
from PIL import Image

import flow
from formats.pictures import film
from sample import ACTING, SHIPPED, Policy
from weights.files import check_keys, parse_json
from weights.options import DEVICE, Parser, output_folder, run_command
from worlds.tabletop import Tabletop

PAGE = Path(__file__).with_suffix(".html")
EXAMPLES = '<script id="examples" type="application/json">'  # in the page; then a json array
HOST = "127.0.0.1"
LONGEST = 200_000  # bytes of a question
TEXT = 100  # bytes of an instruction
PAST = 2000  # actions since a world began
JSON = "application/json"

# -- questions and answers ------------------------------------------------------------------------


@dataclass
class Question:
    """Which mode is asked, in which world, and what it is given. Actions are in robot units; modes
    that find their own, joint and vla, read none."""

    mode: str = "joint"
    steps: int = 10  # K
    seed: int = 0  # of the world and of the noise
    randomized: bool = False  # its look
    instruction: str = ""  # the world's own if empty
    done: list = field(default_factory=list)  # actions (n, 3) since the world began
    actions: list = field(default_factory=list)  # to obey, at most (S, 3); the expert's if empty

    @classmethod
    def of(cls, stored: dict) -> "Question":
        """ValueError for a key, a kind or a number that is none of these."""
        check_keys(stored, cls, "question")
        for name, value in stored.items():
            kind = type(getattr(cls(), name))
            if type(value) is not kind:
                raise ValueError(f"{name} is {value!r:.60}; expected a json {kind.__name__}")
        found = cls(**stored)
        flow.mode_named(found.mode)
        if len(found.instruction.encode()) > TEXT:
            raise ValueError(f"instruction is {found.instruction:.60}...; at most {TEXT} bytes")
        return found

    def rows(self, name: str, most: int) -> ndarray:
        """A list of actions, (n, 3); ValueError if it holds anything else, or more."""
        value = getattr(self, name)
        try:
            found = np.array(value, float).reshape(-1, 3)
        except (TypeError, ValueError, OverflowError):
            found = np.full((1, 3), np.nan)  # refused below
        if len(found) > most or not (np.abs(found) <= 1).all():
            expected = f"expected at most {most} rows of 3 numbers in [-1, 1]"
            raise ValueError(f"{name} is {str(value):.60}; {expected}")
        return found


def picture(films: ndarray) -> str:
    """Films (n, 1+F, H, W, 3) uint8 as one picture, a row each, in a URL."""
    file = io.BytesIO()
    rows = Image.fromarray(rearrange(films, "n f h w c -> (n h) (f w) c"))
    rows.save(file, "WEBP", quality=92)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def answered(policy: Policy, question: Question) -> tuple[ndarray, ndarray, dict]:
    """The film so far at each time (K+1, 1+F, H, W, 3); that of the simulator (1+F, H, W, 3); and
    the rest of `answer`."""
    robot = policy.statistics
    mode = question.mode

    # The world, as it is now.
    world = Tabletop(1, robot.embodiment, question.randomized, "eval")
    world.reset([question.seed])
    for action in question.rows("done", PAST):
        world.advance(action[None])
    text = question.instruction or world.instruction[0]
    state = robot.state.apply(torch.tensor(world.state()))
    inputs = policy.inputs(torch.tensor(world.render()), [text], state)

    # The simulator does all that a mode may be given.
    chunk = policy.model.config.chunk
    if mode not in ACTING:
        obeyed, truth = world.obey(chunk, robot.rate, question.rows("actions", chunk)[:, None])
        shot = torch.tensor(truth, device=policy.device)
        inputs.latents = policy.backbones.encode_video(shot)
        inputs.actions = robot.actions.apply(torch.tensor(obeyed).to(inputs.state))

    # Each Euler step calls the network once, with what there is so far.
    policy.steps = question.steps
    policy.generator.manual_seed(question.seed)
    calls = []
    with policy.model.register_forward_pre_hook(lambda _, call: calls.append(call[:2])):
        found = policy.sample(inputs, mode)
    calls.append([old if new is None else new for new, old in zip(found, calls[-1])])
    videos, actions = map(torch.cat, zip(*calls))
    films = policy.backbones.decode_video(videos).cpu().numpy()
    actions = robot.actions.invert(actions.float()).cpu().numpy()
    if mode in ACTING:
        obeyed, truth = world.obey(chunk, robot.rate, actions[-1][:, None])

    times = flow.sampling_times(question.steps)
    rest = {
        "instruction": text,
        "goal": world.goal[0].tolist(),
        "times": [flow.pinned_times(what, times).tolist() for what in flow.MODES[mode][:2]],
        "actions": actions.tolist(),
        "obeyed": obeyed[0].tolist(),
        "state": world.state()[0].tolist(),
        "solved": world.success.tolist()[0],
    }
    return films, truth[0], rest


def answer(policy: Policy, question: Question) -> dict:
    """Both times (2, K+1) as they ran; at each of them the film so far, a row of a picture, and the
    actions so far (K+1, S, 3); the actions that the simulator obeyed (S, 3), its film, and the
    state at its end (3,)."""
    films, truth, rest = answered(policy, question)
    return rest | {"dream": picture(films), "film": picture(truth[None])}


def told(policy: Policy, path: Path) -> None:
    """A film: one observation under three actions, as it is imagined and as the simulator has
    it."""
    columns = {}
    for name, place in {"left": [-0.6, 0], "right": [0.6, 0], "up": [0, -0.7]}.items():
        question = Question("world_model", seed=4, actions=[[*place, -1]])
        dreams, truth, _ = answered(policy, question)
        columns |= {f"told {name}": dreams[-1], f"truly {name}": truth}
    film(path, columns, "the same observation, told three actions")


def recorded(policy: Policy) -> str:
    """The page with the answers of its examples; some go on where the one before them ended."""
    page = PAGE.read_text()
    stored = page.split(EXAMPLES)[1].split("</script>")[0]
    examples = json.loads(stored)
    done = []
    for example in examples:
        question = example["question"]
        question["done"] = done if "on" in example else []
        example["answer"] = answer(policy, Question.of(question))
        done = question["done"] + example["answer"]["obeyed"]
    return page.replace(stored, json.dumps(examples))


# -- the server -----------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers this machine alone: a page of another site whose name is made to lead here sends
    another Host, and cannot send json."""

    lock = Lock()  # one question at a time
    timeout = 60  # seconds for which a sender may be silent
    error_content_type = JSON
    error_message_format = '{"error": "%(message)s"}'

    def do_POST(self) -> None:
        """Sends what is asked for, or in one line why it is not."""
        host = self.headers["Host"] or ""
        try:
            if host.partition(":")[0] not in (HOST, "localhost"):
                raise ValueError(f"Host is {host:.60}; expected {HOST} or localhost")
            text = self.answer() if self.command == "POST" else self.page()
            status = 200
        except ValueError as error:
            text = json.dumps({"error": str(error)})
            status = 400
        with suppress(ConnectionError):  # whoever has left needs no answer
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if text[0] == "<" else JSON)
            self.end_headers()
            self.wfile.write(text.encode())

    do_GET = do_POST

    def page(self) -> str:
        if self.path != "/":
            raise ValueError(f"GET {self.path:.60} is not here; expected /")
        return PAGE.read_text()

    def answer(self) -> str:
        size = self.headers["Content-Length"] or ""
        if not size.isdecimal() or int(size) > LONGEST:
            raise ValueError(f"Content-Length is {size:.60}; expected 0 to {LONGEST}")
        body = self.rfile.read(int(size))
        if (self.path, self.headers["Content-Type"]) != ("/ask", JSON):
            raise ValueError(f"POST {self.path:.60} is not here; expected {JSON} for /ask")
        question = Question.of(parse_json(Path("question"), body))
        with self.lock:
            return json.dumps(answer(self.server.policy, question))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m scripts.play", description=__doc__)
    add = parser.option
    add("--ckpt", str, "run of stage 3, or one of its step_NNNNNN (default: the shipped policy)")
    add("--port", 8000, "of this machine; 0 takes a free one")
    add(
        "--record",
        output_folder,
        "write index.html, recorded answers, and told.gif there; stop",
    )
    add(*DEVICE)
    args = parser.parse_args(argv)
    policy = Policy.load(args.ckpt or SHIPPED)
    robot = policy.statistics.embodiment
    if policy.card.preset != "toy" or robot != "gripper":
        raise ValueError(f"--ckpt acts with {robot}; expected a gripper, of preset toy")
    if args.record:
        args.record.mkdir(parents=True, exist_ok=True)
        (args.record / "index.html").write_text(recorded(policy))
        told(policy, args.record / "told.gif")
        print(f"wrote {args.record / 'index.html'} and told.gif")
        return
    try:
        server = ThreadingHTTPServer((HOST, args.port), Handler)
    except OSError as error:
        raise ValueError(f"--port {args.port}: {error.strerror}; name another") from error
    server.policy = policy
    print(f"drive it at http://{HOST}:{server.server_port}/ until Ctrl-C", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_command(main)
