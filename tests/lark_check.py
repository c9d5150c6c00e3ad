"""Lark's own SDK as the judge of fake_feishu.py, in an environment of its own.

JSON on stdin: {"events": [{encrypt_key, verification_token, body, headers}], "sends":
[{domain, app_id, app_secret, receive_id_type, receive_id, text, uuid}]}. On stdout, for
each event what the SDK's dispatcher answers and what its handler was given, and for
each send what its client returns.
"""

import json
import sys
from typing import Any

import lark_oapi
from lark_oapi.api.im.v1 import CreateMessageRequest
from lark_oapi.api.im.v1 import CreateMessageRequestBody
from lark_oapi.api.im.v1 import P2ImMessageReceiveV1
from lark_oapi.core.model import RawRequest


def dispatch(case: dict) -> dict:
    """Hand one request to the dispatcher."""
    seen: list[dict] = []
    builder = lark_oapi.EventDispatcherHandler.builder(
        case["encrypt_key"], case["verification_token"]
    )
    handler = builder.register_p2_im_message_receive_v1(
        lambda e: seen.append(summary(e))
    ).build()
    request = RawRequest()
    request.uri, request.headers, request.body = (
        "/",
        case["headers"],
        case["body"].encode(),
    )
    response = handler.do(request)
    return {
        "status": response.status_code,
        "content": response.content.decode(),
        "event": seen[0] if seen else None,
    }


def summary(data: P2ImMessageReceiveV1) -> dict:
    """What the SDK made of an event."""
    message, sender = data.event.message, data.event.sender
    mentions = message.mentions or []
    return {
        "event_id": data.header.event_id,
        "message_id": message.message_id,
        "chat_id": message.chat_id,
        "chat_type": message.chat_type,
        "message_type": message.message_type,
        "content": json.loads(message.content),
        "open_id": sender.sender_id.open_id,
        "sender_type": sender.sender_type,
        "mentions": [[m.key, m.id.open_id, m.name, m.mentioned_type] for m in mentions],
    }


def send(case: dict) -> dict:
    """Send one message with the SDK's client."""
    builder = (
        lark_oapi.Client.builder().app_id(case["app_id"]).app_secret(case["app_secret"])
    )
    client = (
        builder.domain(case["domain"]).log_level(lark_oapi.LogLevel.CRITICAL).build()
    )
    body = (
        CreateMessageRequestBody.builder()
        .receive_id(case["receive_id"])
        .msg_type("text")
    )
    body = body.content(json.dumps({"text": case["text"]})).uuid(case["uuid"]).build()
    request = CreateMessageRequest.builder().receive_id_type(case["receive_id_type"])
    response = client.im.v1.message.create(request.request_body(body).build())
    id = response.data.message_id if response.data else None
    return {"code": response.code, "msg": response.msg, "message_id": id}


def main() -> None:
    lark_oapi.logger.setLevel("CRITICAL")
    cases: dict[str, Any] = json.load(sys.stdin)
    results = {
        "events": [dispatch(case) for case in cases["events"]],
        "sends": [send(case) for case in cases["sends"]],
    }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
