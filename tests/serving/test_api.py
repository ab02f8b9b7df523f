"""The server as the official openai client sees it."""

from typing import Any

import openai
import pytest
import torch
from pydantic import BaseModel
from serving.schemas import ChatRequest, CompletionRequest

import fastlora
from fastlora import functional as FL

CHAT = [{"role": "user", "content": "# os\ndef walk(top):"}]
PROMPT = "def walk(top):"


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def models(adapter_folders):
    """(name -> model, tokenizer), loaded in this process: the references."""
    base, tokenizer = fastlora.load("demo", dtype="float32")
    loaded = {n: fastlora.load_adapter(base, folder) for n, folder in adapter_folders.items()}
    return {"demo": base, **loaded}, tokenizer


def chat(client, model="demo", **settings):
    settings = {"max_tokens": 12, "temperature": 0, "messages": CHAT, **settings}
    return client.chat.completions.create(model=model, **settings)


def text_of_stream(stream, choice=0):
    found = [c for chunk in stream for c in chunk.choices if c.index == choice]
    return "".join(c.delta.content or "" for c in found), found[-1].finish_reason


def test_models_are_the_base_and_its_adapters(client):
    assert [m.id for m in client.models.list()] == ["demo", "one", "two"]
    assert client.models.retrieve("one").id == "one"
    with pytest.raises(openai.NotFoundError, match="'three'"):
        client.models.retrieve("three")


@pytest.mark.parametrize("name", ["demo", "one", "two"])
def test_greedy_replies_equal_generate_text_of_each_model(client, models, name):
    loaded, tokenizer = models
    expected = loaded[name].generate_text(tokenizer, CHAT, max_new_tokens=12)
    reply = chat(client, name)
    assert reply.choices[0].message.content == expected
    assert reply.model == name and reply.object == "chat.completion"


def test_models_write_different_replies(client):
    texts = {chat(client, name).choices[0].message.content for name in ("demo", "one", "two")}
    assert len(texts) == 3


@pytest.mark.parametrize("name", ["demo", "two"])
def test_a_streamed_reply_equals_the_complete_one(client, name):
    whole = chat(client, name).choices[0]
    text, reason = text_of_stream(chat(client, name, stream=True))
    assert (text, reason) == (whole.message.content, whole.finish_reason)


def test_a_streams_first_chunk_has_the_role_and_the_last_the_usage(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and all(c.usage is None for c in chunks[:-1])
    assert all("usage" in c.model_fields_set for c in chunks)  # null, as from OpenAI
    assert chunks[-1].usage == chat(client).usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_continue_texts_and_ids(client, models):
    loaded, tokenizer = models
    expected = loaded["one"].generate_text(tokenizer, PROMPT, max_new_tokens=16)
    for prompt in (PROMPT, tokenizer.encode(PROMPT)):
        reply = client.completions.create(model="one", prompt=prompt, temperature=0)
        assert reply.choices[0].text == expected
        assert reply.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    several = client.completions.create(model="one", prompt=[PROMPT, "import"], temperature=0)
    assert [c.index for c in several.choices] == [0, 1]
    assert several.choices[0].text == expected
    stream = client.completions.create(model="one", prompt=PROMPT, temperature=0, stream=True)
    assert "".join(c.text for chunk in stream for c in chunk.choices) == expected


def test_n_choices_are_different_samples_and_a_seed_repeats_them(client):
    run = lambda **more: chat(client, n=4, temperature=1, max_tokens=12, **more).choices
    first, second = ([c.message.content for c in run(seed=5)] for _ in range(2))
    assert first == second and len(set(first)) == 4
    assert first != [c.message.content for c in run(seed=6)]
    alone = chat(client, temperature=1, max_tokens=12, seed=5).choices[0].message.content
    assert alone == first[0]


def test_streams_of_n_choices_have_their_numbers(client):
    settings = dict(n=3, temperature=1, seed=5, max_tokens=10)
    whole = [c.message.content for c in chat(client, **settings).choices]
    chunks = list(chat(client, stream=True, **settings))
    assert [text_of_stream(chunks, i)[0] for i in range(3)] == whole


def test_logprobs_equal_the_models_own(client, models):
    loaded, tokenizer = models
    reply = client.completions.create(
        model="two", prompt=PROMPT, logprobs=0, temperature=1, seed=1, max_tokens=12
    ).choices[0]
    found = reply.logprobs
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
    id_of = {tokenizer.decode([i], skip_special_tokens=False): i for i in range(4096)}
    ids = torch.tensor([tokenizer.encode(PROMPT) + [id_of[text] for text in found.tokens]])
    two = loaded["two"]
    expected = FL.token_logprobs(two.adapter, two.base, two.spec, ids, ids)[0, -len(found.tokens) :]
    assert found.token_logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_chat_logprobs_have_a_token_and_its_bytes(client):
    reply = chat(client, logprobs=True, max_tokens=8).choices[0]
    tokens = reply.logprobs.content
    assert "".join(t.token for t in tokens) == reply.message.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == reply.message.content
    assert all(t.logprob <= 0 and t.top_logprobs == [] for t in tokens)
    streamed = [
        t
        for chunk in chat(client, logprobs=True, max_tokens=8, stream=True)
        for c in chunk.choices
        if c.logprobs
        for t in c.logprobs.content
    ]
    assert streamed == tokens


def test_top_logprobs_are_the_likeliest_tokens_of_each_step(client, models):
    loaded, tokenizer = models
    found = chat(client, "two", logprobs=True, top_logprobs=3, max_tokens=8, temperature=2, seed=1)
    tokens = found.choices[0].logprobs.content
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    for token in tokens:
        p = loaded["two"](torch.tensor([ids]))[0, -1].log_softmax(-1)
        values, likeliest = p.topk(3)
        assert [t.logprob for t in token.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in likeliest.tolist()]
        assert [t.token for t in token.top_logprobs] == texts
        # A text may have several ids, which differ in their log-probabilities.
        same = [i for i in range(4096) if abs(float(p[i]) - token.logprob) < 1e-4]
        decoded = {tokenizer.decode([i], skip_special_tokens=False): i for i in same}
        ids = [*ids, decoded[token.token]]
    reply = client.completions.create(
        model="two", prompt=PROMPT, logprobs=2, max_tokens=4, temperature=2, seed=1
    )
    found = reply.choices[0].logprobs
    for token, logprob, others in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert len(others) in (2, 3) and others[token] == logprob


def test_a_stop_string_across_tokens_ends_the_reply_before_it(client, server):
    whole = chat(client, max_tokens=20)
    text = whole.choices[0].message.content
    middle = len(text) // 2
    stop = text[middle : middle + 5]  # begins and ends anywhere in a token
    cut = text[: text.index(stop)]
    for stops in (stop, ["never written", stop]):
        reply = chat(client, stop=stops, logprobs=True, max_tokens=20)
        assert reply.choices[0].message.content == cut
        assert reply.choices[0].finish_reason == "stop"
        assert "".join(t.token for t in reply.choices[0].logprobs.content).startswith(cut)
        assert text_of_stream(chat(client, stop=stops, stream=True)) == (cut, "stop")
    server.wait_idle()


def test_content_may_be_parts_and_roles_may_be_developer(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    assert chat(client, messages=parts).choices[0].message == chat(client).choices[0].message
    system, developer = (
        chat(client, messages=[{"role": role, "content": "Be brief."}, *CHAT])
        for role in ("system", "developer")
    )
    assert system.usage == developer.usage
    assert system.choices[0].message == developer.choices[0].message


def test_a_reply_ends_at_the_models_limit(client):
    limit, long = 512, [{"role": "user", "content": "def f(x):\n" * 80}]
    reply = chat(client, "one", messages=long, max_tokens=None)
    assert limit - 30 < reply.usage.prompt_tokens < reply.usage.total_tokens <= limit
    reply = client.completions.create(model="one", prompt=[5] * 500, max_tokens=12, temperature=0)
    assert reply.usage.total_tokens <= limit


SCHEMAS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "chat/completions": (ChatRequest, {"model": "demo", "messages": CHAT}),
    "completions": (CompletionRequest, {"model": "demo", "prompt": PROMPT}),
}
WRONG = {
    "temperature": {"temperature": 3},
    "top_p": {"top_p": 0},
    "max_tokens": {"max_tokens": 10_000},
    "max_completion_tokens": {"max_tokens": None, "max_completion_tokens": 513},
    "n": {"n": 17},
    "seed": {"seed": 1.5},
    "stop[0]": {"stop": [""]},
    "messages": {"messages": []},
    "messages[0].role": {"messages": [{"role": "robot", "content": "x"}]},
    "messages[0].content": {"messages": [{"role": "user", "content": None}]},
    "messages[0].content[0].type": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]
    },
    "top_logprobs": {"top_logprobs": 2},
    "presence_penalty": {"presence_penalty": 0.5},
    "logit_bias": {"logit_bias": {"5": 1}},
    "response_format": {"response_format": {"type": "json_object"}},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "tempereture": {"extra_body": {"tempereture": 1}},
    "stream_options": {"stream_options": {"include_usage": True}},
    "stream_options.usage": {"stream": True, "stream_options": {"usage": True}},
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_or_unknown_field_is_named(client, field):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **WRONG[field])
    error = caught.value.body
    assert error["param"] == field
    assert error["message"].startswith(f"{field}: ")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("route", SCHEMAS)
def test_every_field_with_a_wrong_value_is_named(server, route):
    """-1.5 is wrong for each."""
    schema, good = SCHEMAS[route]
    with server.http() as http:
        for field in schema.model_fields:
            response = http.post(f"/v1/{route}", json=good | {field: -1.5})
            error = response.json()["error"]
            assert response.status_code == 400 and error["param"] == field, (field, error)
            assert error["message"].startswith(f"{field}: ") and "-1.5" in error["message"]


def test_values_that_change_nothing_are_accepted(client):
    same = chat(
        client, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, user="me",
        response_format={"type": "text"}, tools=[], top_p=1.0,
    )  # fmt: skip
    assert same.choices[0].message == chat(client).choices[0].message


def test_a_reply_as_a_dict_is_a_message(client):
    first = chat(client, max_tokens=4).choices[0].message
    texts = {
        chat(client, messages=[*CHAT, message, *CHAT]).choices[0].message.content
        for message in (
            {"role": "assistant", "content": first.content},
            first,
            first.model_dump(),
            first.model_dump() | {"annotations": []},
        )
    }
    assert len(texts) == 1


def test_unknown_models_and_routes_are_404(client, server):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, "three")
    assert caught.value.body["param"] == "model"
    assert caught.value.body["code"] == "model_not_found"
    with server.http() as http:
        assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
        assert http.get("/v1/completions").status_code == 405


def test_a_prompt_that_fills_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=[5] * 512)
    assert caught.value.body["code"] == "context_length_exceeded"
    assert "512" in caught.value.body["message"]


@pytest.mark.parametrize("prompt", ["", [], [[]], [4096], [[1], [-1]], [1.5]])
def test_prompts_without_a_token_or_with_wrong_ids(client, prompt):
    if prompt == "":  # the tokenizer adds BOS, so the text is not empty
        assert client.completions.create(model="demo", prompt="", max_tokens=1).choices
        return
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=prompt)
    assert caught.value.body["param"].startswith("prompt")


def test_top_k_and_min_p_come_in_the_extra_body(client):
    greedy = chat(client).choices[0].message.content
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        reply = chat(client, temperature=1, extra_body=extra)
        assert reply.choices[0].message.content == greedy
    # vLLM's values of no limit
    free, zero, minus = (
        chat(client, temperature=1, seed=1, extra_body=extra).choices[0].message.content
        for extra in ({}, {"top_k": 0}, {"top_k": -1})
    )
    assert free == zero == minus != greedy


def test_health_metrics_and_schema(server, client):
    before = server.metric("new_tokens_total")
    tokens = chat(client, max_tokens=7).usage.completion_tokens
    with server.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        page = http.get("/metrics")
        paths = http.get("/openapi.json").json()["paths"]
    assert server.metric("new_tokens_total") == before + tokens
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'fastlora_http_responses_total{route="/v1/chat/completions",status="200"}' in page.text
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health"} <= set(paths)


def test_a_body_without_its_content_type_is_415(server):
    body = b'{"model": "demo", "prompt": "a", "max_tokens": 1}'
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends
    with server.http() as http:
        for headers in ({}, form, {"Content-Type": "text/plain"}):
            response = http.post("/v1/completions", content=body, headers=headers)
            assert response.status_code == 415, headers
            assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"[1]", b"nonsense", b'{"model": "demo", "prompt": ' + b"[" * 50_000,
     b'{"model": "demo", "prompt": "\\ud800"}', b'{"model": NaN}', b"\xff\xfe",
     b'{"model": "demo", "prompt": "a", "temperature": NaN}',
     b'{"model": "demo", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}"],
    ids=range(10),
)  # fmt: skip
def test_malformed_json_is_400(server, body):
    with server.http() as http:
        headers = {"Content-Type": "application/json"}
        response = http.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
