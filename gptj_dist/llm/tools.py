"""What tools change in the parameters and the outputs of `LLM.chat`. Knows no template and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gptj_dist.answers.schema.base import check_fields, naming
from gptj_dist.answers.schema.chat import ChatTools
from gptj_dist.answers.schema.tool_use import ToolUse
from gptj_dist.llm.outputs import Completion, Output, ToolCall
from gptj_dist.params import SamplingParams
from gptj_dist.text.grammar import Grammars
from gptj_dist.text.tool_calls import CallReader, ToolFormat, call_id


def read_tools(tools: object, tool_choice: object, parallel_tool_calls: object) -> ToolUse:
    """Tools in OpenAI's form, checked.

    Raises:
        InvalidRequestError: names the argument at fault.
    """
    given = {"tools": tools, "tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
    tool_use = check_fields(given, ChatTools).tool_use
    tool_use.check(None, "structured_outputs")
    return tool_use


def with_tools(
    params: Sequence[SamplingParams], tools: ToolUse, form: ToolFormat, grammars: Grammars
) -> list[SamplingParams]:
    """The parameters of texts that call tools.

    Args:
        form: how the model writes calls.

    Raises:
        InvalidRequestError: a text must match something else, too, or a tool's schema cannot be served.
    """
    if not tools.shown:
        return list(params)
    for each in params:
        tools.check(each.structured_outputs, "structured_outputs")
    with naming(ChatTools()):
        grammar = tools.grammar(form)
        grammars.check(grammar)
    return [replace(each, structured_outputs=grammar) for each in params]


def with_calls(output: Output, form: ToolFormat) -> Output:
    """The output with the calls that are in its texts."""
    prompt = " ".join(map(str, output.prompt_ids))
    completions = [_read(completion, form, prompt, choice) for choice, completion in enumerate(output.completions)]
    return replace(output, completions=tuple(completions))


def _read(completion: Completion, form: ToolFormat, prompt: str, choice: int) -> Completion:
    text, pieces = CallReader(form).push(completion.text, is_last=True)
    calls = [
        ToolCall(call_id(prompt, choice, piece.number), piece.name, piece.arguments)
        for piece in pieces
        if piece.name is not None
    ]
    return replace(completion, text=text, tool_calls=tuple(calls))
