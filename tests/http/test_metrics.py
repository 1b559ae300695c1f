"""What `/metrics` says of the work done."""

from __future__ import annotations

from tests.support.server import Server, metric


def test_requests_sequences_and_tokens_are_counted(server: Server) -> None:
    route = "/v1/completions"
    before = server.metrics()
    body = {"prompt": ["hello", "the cat"], "max_tokens": 5, "n": 2, "ignore_eos": True}
    usage = server.post(route, body).json()["usage"]
    assert server.post(route, {"prompt": 1}).status_code == 400
    after = server.metrics()

    def grown(name: str, **labels: str) -> float:
        return metric(after, name, route=route, **labels) - metric(
            before, name, route=route, **labels
        )

    assert grown("requests_total", status="200") == 1
    assert grown("requests_total", status="400") == 1
    assert grown("sequences_total", finish_reason="length") == 4
    assert grown("prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("generated_tokens_total") == usage["completion_tokens"] == 20
    assert grown("time_to_first_token_seconds_count") == 4
    assert grown("time_per_output_token_seconds_count") == 4
    assert grown("request_duration_seconds_count") == 2
    assert 0 < grown("time_to_first_token_seconds_sum") < 4 * grown("request_duration_seconds_sum")


def test_the_runners_state_is_as_of_now(server: Server) -> None:
    assert server.gauge("ready") == 1
    assert server.gauge("admission_limit") == 256
    assert server.gauge("admitted_sequences") == 0
    assert server.gauge("kv_tokens_total") > 0
    text = server.metrics()
    assert text.count("# TYPE triptych_ready gauge") == 1
    assert "bentoml_service_request_total" in text


def test_paths_of_scanners_do_not_become_labels(server: Server) -> None:
    server.get("/wp-admin/setup.php")
    server.get("/v1/models/one-that-is-not-there")
    ours = [line for line in server.metrics().splitlines() if line.startswith("triptych_")]
    assert not any("wp-admin" in line or "not-there" in line for line in ours)
    assert any('route="other",status="404"' in line for line in ours)
