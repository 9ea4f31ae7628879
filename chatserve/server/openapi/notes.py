"""What each field of a request means, in a sentence.

By its name, and by that of the request, too, where it means something else there.
"""

from __future__ import annotations

from collections.abc import Mapping

NO_OP = "not supported: only what changes nothing is accepted"

NOTES: Mapping[str, str] = {
    "model": "the name of a model that is served, or `MODEL:ADAPTER`",
    "messages": "the conversation so far; `developer` is another word for `system`, and a "
    "message's `name` is a label that changes nothing",
    "prompt": "a text, token ids, or a list of either",
    "stream": "send the answer as it comes, as server-sent events",
    "stream_options": "`include_usage`: a last chunk with the token counts; "
    "`continuous_usage_stats`: counts in every chunk",
    "n": "how many answers",
    "best_of": "how many answers are made, of which the `n` best are given, best first: those that "
    "`rank_by` rates highest, else the likeliest; default `n`",
    "rank_by": "a reward model beside the base, NAME or MODEL:NAME: the answers come in the order "
    "of its scores, each with its `score`; for 2 or more answers, not for streams or tools",
    "max_tokens": "the longest answer, in tokens; default: what the context has room for, 16 for a "
    "text completion",
    "max_completion_tokens": "the newer name of `max_tokens`",
    "min_tokens": "the shortest answer, in tokens",
    "ignore_eos": "go on where the model would end",
    "priority": "`batch` where nobody waits for it: `interactive` ones, the default, go first, but "
    "not for ever",
    "logprobs": "with each token, the logarithm of the probability that it was drawn with",
    "CompletionRequest.logprobs": "the same, and so many of the likeliest tokens, too",
    "top_logprobs": "with `logprobs`: so many of the likeliest tokens, too",
    "return_token_ids": "the ids that were generated, also those that are no text, as `token_ids` "
    "of each choice, and those of the prompt, `prompt_token_ids`, in a stream once",
    "truncation": "`rolling`: where the context is too short, the oldest turns are dropped, never "
    "the system message or the last question, and `usage` says which; default: refuse with the "
    "numbers",
    "echo": "give the prompt back before the answer; with `logprobs` it is scored, and with "
    "`max_tokens` 0 only that",
    "replay": "repeat an answer of the replay log, as `chatserve replay` does: `grammar` is what "
    "it had to match, in the log's words",
    "temperature": "0 takes the likeliest token; default 1",
    "top_p": "only the likeliest tokens, up to this share; default 1",
    "top_k": "only so many of the likeliest tokens; 0 or -1: all",
    "min_p": "only tokens at least this share as likely as the likeliest; default 0",
    "repetition_penalty": "over 1 makes tokens of prompt and answer less likely; default 1",
    "presence_penalty": "taken off the logit of every token that the answer has had",
    "frequency_penalty": "the same, for each time",
    "seed": "the same seed gives the same text",
    "stop": "texts that end the answer and are not part of it, each of at most 256 bytes",
    "stop_token_ids": "ids of tokens that end the answer and are not part of it",
    "logit_bias": "added to the logits of tokens, by id",
    "response_format": "what the answer must be: text, any JSON object, or JSON that matches a "
    "schema; `strict` or not, it is kept to the letter",
    "structured_outputs": "what the answer must match, in vLLM's words; one of its fields",
    "guided_json": "a JSON Schema, or its text, that the answer must match",
    "guided_regex": "a regular expression that the whole answer must match",
    "guided_choice": "the texts of which the answer must be one",
    "guided_grammar": "a grammar, Lark or GBNF, that the answer must match",
    "tools": "functions that the model may ask for, each with the JSON Schema of its arguments, "
    "which are held to it",
    "tool_choice": "`none` hides the tools, `auto` lets the model choose, `required` makes it call "
    "one or more; an object names the one to call, or those that may be called",
    "parallel_tool_calls": "false: at most one call in an answer; default true",
    "continue_final_message": "the last message, the assistant's, is the beginning of the answer; "
    "the reply has only what follows",
    "ChatRequest.add_generation_prompt": "the contrary of `continue_final_message`",
    "TokenizeRequest.prompt": "a text",
    "add_special_tokens": "with those that begin a text; default true",
    "add_generation_prompt": "up to where the answer begins; default true",
    "return_token_strs": "each token as a text, too",
    "tokens": "token ids",
    "skip_special_tokens": "leave out what a chat would not show; default false",
    "EmbeddingRequest.input": "a text, token ids, or a list of either",
    "encoding_format": "`float`: numbers; `base64`: little-endian float32; default numbers",
    "dimensions": "only so many of each vector, the first, and length 1 again; default all",
    "truncate_prompt_tokens": "keep so many tokens of each text, the first, -1 for as many as the "
    "model holds; `usage` says how many were dropped; default: refuse with the numbers",
    "pooling": "the mean of all hidden states, the last token's or, of encoders only, the first's; "
    "default: as the model's files say, else the mean",
    "text_1": "a text, or as many as `text_2` has; of a reward model: questions",
    "text_2": "a text, or several; of a reward model: answers",
    "use_activation": "of a reward model: scores from 0 to 1, by a sigmoid; default: as it says "
    "them",
    "input": "a text, or items: messages, calls of functions and what these gave; `id`, `status` "
    "and `phase` are labels that change nothing",
    "instructions": "the system message, of this response alone",
    "previous_response_id": "go on from a response that is kept: its items come before `input`",
    "max_output_tokens": "the longest answer, in tokens; default: what the context has room for",
    "text": "`format`: what the answer must match",
    "include": "`message.output_text.logprobs`: with each token, the logarithm of the probability "
    "that it was drawn with",
    "ResponsesRequest.top_logprobs": "with `include`: so many of the likeliest tokens, too",
    "ResponsesRequest.truncation": "`auto`: where the context is too short, the oldest turns are "
    "dropped, never the instructions or the last question, and `usage` says which; default: refuse "
    "with the numbers",
    "ResponsesRequest.store": "false: keep nothing of it; default true",
    "ResponsesRequest.metadata": "up to 16 labels, which the response has, too",
    "system": "a text, or text blocks; comes before the messages",
    "CountTokensRequest.messages": "as in a message",
    "MessagesRequest.messages": "the conversation so far; where the last one is the assistant's, "
    "it is the beginning of the answer",
    "MessagesRequest.max_tokens": "the longest answer, in tokens",
    "MessagesRequest.top_k": "only so many of the likeliest tokens; 0: all",
    "MessagesRequest.tool_choice": "`none` hides the tools, `auto` lets the model choose, `any` "
    "makes it call one or more, `tool` the one that is named; `disable_parallel_tool_use`: at most "
    "one call",
    "CountTokensRequest.tool_choice": "`none` hides the tools: they are not counted",
    "MessagesRequest.metadata": "`user_id`: a label; changes nothing",
    "stop_sequences": "texts that end the answer and are not part of it; `stop_sequence` says "
    "which one did",
    "output_config": "`format`: a JSON Schema that the answer must match",
    "user": "a label; changes nothing",
    "metadata": "labels; change nothing",
    "store": "accepted; nothing is stored",
    "safety_identifier": "a label; changes nothing",
    "prompt_cache_key": "a label; changes nothing",
    "lora_name": "NAME, or BASE:NAME where several models are served",
    "lora_path": "a folder below `--adapter-root` on the worker's machine",
    "load_inplace": "put it in the place of one that has the name already",
}
