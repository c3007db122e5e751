"""`msae serve`: the page, its answers, and who gets none."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from latent_inputs import HOOK, write_latents_inputs
from starlette.testclient import TestClient

from msae_plugin.common.errors import InputError
from msae_plugin.models.loading import LanguageModel
from msae_plugin.reporting.look import SAEInModel, open_sae
from msae_plugin.reporting.serve import application, require_free

TEXT = "A rose in the garden"


@pytest.fixture(scope="module")
def opened(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_dir: Path,
    tiny_texts: list[str],
    tiny_language_model: LanguageModel,
) -> SAEInModel:
    source = write_latents_inputs(tmp_path_factory.mktemp("serve"), tiny_model_dir, tiny_texts)
    return open_sae(str(source / "saes/tiny_seed1"), language_model=tiny_language_model)


@pytest.fixture(scope="module")
def client(opened: SAEInModel) -> Iterator[TestClient]:
    with TestClient(application(opened), base_url="http://127.0.0.1:8765") as made:
        yield made


def test_the_page_names_the_sae_and_asks_no_other_server(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert HOOK in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'self'")


def test_look_answers_what_msae_look_shows(client: TestClient, opened: SAEInModel) -> None:
    answer = client.post("/look", json={"text": TEXT, "top": 3}).json()
    expected = opened.look(TEXT, 3)
    assert answer["rows"] == [vars(row) for row in expected.rows]
    assert answer["l0"] == expected.l0


def test_steering_adds_the_decoder_row_at_every_token(
    client: TestClient, opened: SAEInModel
) -> None:
    asked = {"text": TEXT, "latent": 2, "added": 500.0, "new_tokens": 4}
    answer = client.post("/steer", json=asked).json()
    model, tokenizer = opened.language_model.model, opened.language_model.tokenizer
    row = opened.evaluated.sae.W_dec[2].detach()
    for name, added in (("without", 0.0), ("with", 500.0)):
        tokens = model.to_tokens(TEXT)
        begin = tokens.shape[1]
        for _ in range(4):
            with torch.no_grad(), model.hooks([(HOOK, lambda acts, hook, a=added: acts + a * row)]):
                following = model(tokens)[0, -1].argmax()
            if int(following) == tokenizer.eos_token_id:
                break
            tokens = torch.cat([tokens, following.reshape(1, 1)], dim=1)
        assert answer[name] == tokenizer.decode(tokens[0, begin:])
    assert answer["with"] != answer["without"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/steer", {"text": TEXT, "latent": 10**6, "added": 1.0}, "does not exist"),
        ("/steer", {"text": TEXT, "latent": 0, "added": 1.0, "new_tokens": 10**6}, "new_tokens"),
        ("/look", {"text": ""}, "text"),
        ("/look", {"text": TEXT, "file": "/etc/passwd"}, "file"),
    ],
)
def test_a_wrong_request_is_answered_in_one_line(
    client: TestClient, path: str, body: dict[str, object], said: str
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    assert said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_other_sites_get_no_answer(client: TestClient) -> None:
    form = client.post("/look", content='{"text": "a"}', headers={"content-type": "text/plain"})
    assert form.status_code == 415
    elsewhere = client.get("/", headers={"host": "example.org"})
    assert elsewhere.status_code == 400


def test_a_taken_port_is_refused_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="choose another --port"):
            require_free(taken.getsockname()[1])
