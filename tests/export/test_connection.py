"""Every fault of the network is one sentence with something to do."""

from __future__ import annotations

import socket

import pytest

from lofi.errors import LofiError, RequestError
from lofi.export.connection import Connection, Refused
from stub_server import serving


def answering(status, value, headers=None):
    return lambda *_: (status, value, headers or {})


def test_json_comes_back_and_the_key_and_the_body_went_out():
    seen = {}

    def respond(method, path, body):
        seen[method] = (path, body)
        return 200, {"fine": True}, {}

    with serving(respond) as url:
        assert Connection(url + "/v1/", "secret").post("/v1/x", {"a": "ệ"}) == {"fine": True}
        assert Connection(url).get("/y") == {"fine": True}
    assert seen == {"POST": ("/v1/x", {"a": "ệ"}), "GET": ("/y", None)}


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", ""])
def test_an_address_must_be_one(url):
    with pytest.raises(RequestError, match="expected an address such as http"):
        Connection(url)


def test_where_nothing_listens_the_request_was_wrong():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RequestError, match=r"nothing answers at .*refused.*start the server"):
        Connection(f"http://127.0.0.1:{port}").get("/v1/models")


def test_a_server_that_is_silent_is_not_waited_for_for_ever():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(1)
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(LofiError, match=r"did not answer within 0.1 seconds") as caught:
            Connection(address, timeout=0.1).get("/v1/models")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("status", "value", "error", "sentence"),
    [
        (200, "<html>hello</html>", LofiError, r"does not answer in JSON but with '<html>"),
        (
            401,
            {"error": {"message": "no key"}},
            Refused,
            r"refuses access \(status 401: no key\); give the server's key",
        ),
        (404, {"error": {"message": "no such\nmodel"}}, Refused, r"refuses the request \(status 404: no such model\)"),
        (422, {"detail": "bad field"}, Refused, r"status 422: bad field"),
        (500, "boom", LofiError, r"failed \(status 500\); see the server's log"),
        (None, "", LofiError, r"broke off its answer"),
    ],
)
def test_what_a_server_says_wrong_is_one_sentence(status, value, error, sentence):
    with serving(answering(status, value)) as url, pytest.raises(error, match=sentence) as caught:
        Connection(url).post("/v1/completions", {})
    assert "\n" not in str(caught.value)


def test_a_key_that_is_refused_is_not_asked_for_again():
    with serving(answering(401, {})) as url, pytest.raises(Refused, match="give another key with --api-key"):
        Connection(url, "wrong").get("/v1/models")


def test_a_busy_server_is_asked_again_when_it_says():
    waits, left = [], [429, 503]

    def respond(*_):
        return (left.pop(0), {}, {"Retry-After": "2.5"} if left else {}) if left else (200, {"at last": 1}, {})

    with serving(respond) as url:
        assert Connection(url, wait=waits.append).get("/v1/models") == {"at last": 1}
    assert waits == [2.5, 1.0]


def test_a_server_that_stays_busy_is_given_up():
    waits = []
    with serving(answering(429, {"error": {"message": "slow down"}})) as url:
        with pytest.raises(LofiError, match=r"too busy \(status 429: slow down\); try again later"):
            Connection(url, wait=waits.append).get("/v1/models")
        assert len(waits) == 4
    with serving(answering(429, {}, {"Retry-After": "3600"})) as url, pytest.raises(LofiError, match="too busy"):
        Connection(url, wait=lambda _: pytest.fail("an hour is not waited for")).get("/v1/models")
