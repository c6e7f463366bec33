"""`gptj-dist chat`: from a pipe, of one message, and at a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
from collections.abc import Iterator

from tests.fake_server import Call, FakeServer, Reply, events, fake_server, refused
from tests.verbs import command_line, environment, run_verb
from tests.waiting import wait_until


def piece(text: str | None, finish_reason: str | None = None) -> dict[str, object]:
    delta = {"role": "assistant"} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def echo(call: Call) -> Reply:
    """Says what it was told last."""
    said = call.json()["messages"][-1]["content"]
    return events(piece(None), piece("you said "), piece(said), piece("", "stop"), {"choices": [], "usage": {}})


def conversations(server: FakeServer) -> list[list[tuple[str, str]]]:
    return [[(m["role"], m["content"]) for m in call.json()["messages"]] for call in server.calls]


def test_lines_of_a_pipe_are_messages_of_one_conversation_until_reset_and_exit() -> None:
    with fake_server(echo) as server:
        done = run_verb(
            "chat", "--system", "Be brief.", "--url", server.base, typed="one\n\ntwo\n/reset\nthree\n/exit\nfour\n"
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "you said one\nyou said two\nyou said three\n", "")
    system, one = ("system", "Be brief."), ("user", "one")
    assert conversations(server) == [
        [system, one],
        [system, one, ("assistant", "you said one"), ("user", "two")],
        [system, ("user", "three")],
    ]


def test_one_message_is_answered_and_that_is_all() -> None:
    with fake_server(echo) as server:
        done = run_verb("chat", "--message", "hello", "--temperature", "0", "--max-tokens", "7", "--url", server.base)
        piped = run_verb("chat", "--message", "-", "--url", server.base, typed="two\nlines\n")
    assert (done.returncode, done.stdout) == (0, "you said hello\n")
    assert piped.stdout == "you said two\nlines\n"
    assert server.calls[0].json() == {
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0,
        "max_tokens": 7,
        "stream": True,
    }


def test_a_model_without_a_template_is_told_as_the_server_tells_it() -> None:
    told = "the model has no chat template, as GPT-J has none: start the server with --chat-template FILE"
    with fake_server(lambda _: refused(400, told)) as server:
        done = run_verb("chat", "--message", "hello", "--url", server.base)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"gptj-dist: {told} (400)\n")


def test_an_answer_that_was_cut_and_a_command_that_is_none_are_mentioned() -> None:
    with fake_server(lambda _: events(piece("and so"), piece("", "length"))) as server:
        done = run_verb("chat", "--url", server.base, typed="tell\n/rest\n")
    assert done.stdout == "and so\n"
    assert done.stderr.splitlines() == [
        "gptj-dist: cut at the most tokens of an answer; --max-tokens sets them",
        "gptj-dist: there is no command /rest: did you mean /reset?",
    ]


class Terminal:
    """A person at a terminal: types, and reads until something appears."""

    def __init__(self, *arguments: str) -> None:
        self._end, inner = pty.openpty()
        self.process = subprocess.Popen(
            command_line(*arguments),
            env=environment(TERM="dumb", PYTHON_BASIC_REPL="1"),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(inner)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def read_until(self, text: str, number: int = 1) -> None:
        def has_come() -> bool:
            if select.select([self._end], [], [], 0)[0]:
                self.seen += os.read(self._end, 65536).decode()
            return self.seen.count(text) >= number

        wait_until(has_come, f"{text!r} appears in {self.seen!r}", timeout_s=30)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


def _take_terminal() -> None:
    """Makes standard input the terminal whose Ctrl-C is this session's."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))


def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_session() -> None:
    def endless(call: Call) -> Reply:
        def parts() -> Iterator[bytes]:
            (part, *_) = events(piece("word ")).parts or ()
            while True:
                yield part

        return Reply(parts=parts()) if call.json()["messages"][-1]["content"] == "go on" else echo(call)

    with fake_server(endless) as server:
        terminal = Terminal("chat", "--url", server.base)
        try:
            terminal.read_until("> ")
            assert "/reset begins" in terminal.seen
            terminal.type("go on\n")
            terminal.read_until("word word")
            terminal.type("\x03")
            terminal.read_until("[stopped]")
            wait_until(lambda: server.num_broken_off == 1, "the server notices", timeout_s=30)
            terminal.type("hello\n")
            terminal.read_until("you said hello")
            terminal.type("\x04")
            assert terminal.process.wait(timeout=30) == 0
        finally:
            terminal.close()
    first, second = conversations(server)
    assert first == [("user", "go on")]
    assert second[0] == ("user", "go on")
    assert second[1][1].startswith("word word")
    assert second[2] == ("user", "hello")


def test_at_a_terminal_an_error_costs_a_message_and_not_the_session() -> None:
    replies = iter([refused(503, "the model is still loading", Retry_After="5")])
    with fake_server(lambda call: next(replies, None) or echo(call)) as server:
        terminal = Terminal("chat", "--url", server.base)
        try:
            terminal.read_until("> ")
            terminal.type("lost\n")
            terminal.read_until("still loading (503); try again in 5 s")
            terminal.type("hello\n")
            terminal.read_until("you said hello")
            terminal.type("/exit\n")
            assert terminal.process.wait(timeout=30) == 0
        finally:
            terminal.close()
    assert conversations(server)[1] == [("user", "hello")]
