"""A name server on loopback that knows SRV records, over UDP."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import trio


class NameServer:
    """Answers from :attr:`records`; counts what it was asked."""

    def __init__(self) -> None:
        self.records: dict[str, tuple[int, list[str]]] = {}  # time to live, and presentation format
        self.asked: list[str] = []
        self.port = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
            await sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
            task_status.started()
            while True:
                query, address = await sock.recvfrom(512)
                await sock.sendto(self._answer(query), address)

    def _answer(self, query: bytes) -> bytes:
        asked = dns.message.from_wire(query)
        (question,) = asked.question
        name = question.name.to_text(omit_final_dot=True)
        self.asked.append(name)
        answer = dns.message.make_response(asked)
        answer.flags |= dns.flags.AA | dns.flags.RA
        if name in self.records:
            ttl, records = self.records[name]
            answer.answer.append(dns.rrset.from_text(question.name, ttl, "IN", "SRV", *records))
        else:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        return answer.to_wire()
