"""The configuration as the rest of the program sees it: frozen, typed, complete.

The keys of the seed file keep their names and defaults; everything else extends them.  Each
option's ``doc`` is what ``citadel-gateway check --schema`` publishes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import attrs

from citadel_gateway.config.values import (
    Algorithm,
    Capability,
    Cost,
    Count,
    Engine,
    Grace,
    HeaderName,
    HttpServer,
    KeyPrefix,
    LogLevel,
    Name,
    Network,
    Origin,
    Port,
    Rate,
    Ratio,
    Resolve,
    RetryAmbiguous,
    Room,
    Seconds,
    Secret,
    Sha256,
    StoreKind,
    StoreUrl,
    Url,
    UrlPath,
    Weight,
)
from citadel_gateway.policy.priority import Priority

T = TypeVar("T")


def option(default: T, doc: str) -> T:
    """A field with a default and a sentence for the JSON Schema."""
    field: Any = attrs.field(default=default, metadata={"doc": doc})
    return field  # type: ignore[no-any-return]  # attrs.field is typed as its default, too


def required(doc: str) -> Any:
    return attrs.field(metadata={"doc": doc})


def secret(doc: str) -> Any:
    """A credential, or nothing; it does not show in ``repr``, and so not in a traceback."""
    return attrs.field(default=None, repr=False, metadata={"doc": doc})


@attrs.frozen(kw_only=True)
class ServiceConfig:
    """Where the gateway listens, and how it starts and stops."""

    name: Name = option(Name("unified-api-gateway"), "Shown in /health and in lists of models.")
    host: str = option("0.0.0.0", "Address to listen on.")  # noqa: S104  # the seed's
    port: Port = option(Port(8000), "Port of the API.")
    workers: Count | None = option(
        None, "Processes that serve, on one address; default: performance.cpu_cores."
    )
    server: HttpServer = option(HttpServer.LLHTTP, "Who speaks HTTP/1.1 to clients.")
    http2: bool = option(True, "Offer HTTP/2 to clients, besides HTTP/1.1, where TLS is on.")
    lame_duck: Grace = option(
        Grace(0.5), "Seconds to go on accepting after readiness turned red, on SIGTERM."
    )
    drain_timeout: Grace = option(
        Grace(60.0), "Seconds that requests in flight get to finish, on SIGTERM."
    )
    reload_on_change: bool = option(
        True, "Read this file again when it has changed; SIGHUP does so in any case."
    )
    keep_alive_timeout: Seconds = option(Seconds(75.0), "Idle client connections close after it.")
    header_timeout: Seconds = option(Seconds(5.0), "A request's head must arrive within it.")
    body_timeout: Seconds = option(Seconds(60.0), "A request's body must arrive within it.")
    write_timeout: Seconds = option(
        Seconds(30.0), "A client that takes less than 64 KiB of its answer in it is hung up on."
    )
    max_connections: Count = option(Count(4096), "Client connections held at once.")
    tls_certfile: str | None = option(None, "PEM certificate chain; turns TLS on.")
    tls_keyfile: str | None = option(None, "PEM key of tls_certfile.")


@attrs.frozen(kw_only=True)
class RoutingConfig:
    """Which model answers a request (the ``gateway`` section)."""

    default_model: Name | None = option(
        None,
        "Answers when no model is asked for and intelligent routing is off; default: the first.",
    )
    model_routing_enabled: bool = option(
        True, "Off: every request goes to default_model, whatever it asks for."
    )
    intelligent_routing: bool = option(
        True, "A request for no model, or for 'auto', may go to any model that can take it."
    )
    cost_optimization_enabled: bool = option(
        True, "Cheaper models get a larger share of 'auto' requests."
    )
    routing_headers: bool = option(
        True, "Tell clients in x-citadel-* headers what happened to their request."
    )


@attrs.frozen(kw_only=True)
class LoadBalancerConfig:
    """How endpoints are picked, watched, rested and retried."""

    algorithm: Algorithm = option(Algorithm.ROUND_ROBIN, "How an endpoint is picked.")
    session_header: HeaderName = option(
        HeaderName("x-session-id"),
        "Header in which clients name their session, for consistent_hash and session_affinity; "
        "it is passed on to the endpoint.",
    )
    session_ttl: Seconds = option(
        Seconds(3600.0), "How long session_affinity remembers where an idle session was."
    )
    health_check_interval: Seconds = option(
        Seconds(30.0), "Between two probes of a healthy endpoint."
    )
    health_check_timeout: Seconds = option(Seconds(2.0), "A probe must answer within it.")
    healthy_after: Count = option(Count(1), "Good probes in a row that make an endpoint healthy.")
    unhealthy_after: Count = option(
        Count(3), "Bad probes in a row that make an endpoint unhealthy."
    )
    circuit_breaker_threshold: Count = option(
        Count(5), "Failures in a row that open an endpoint's breaker."
    )
    circuit_breaker_timeout: Seconds = option(
        Seconds(60.0),
        "How long an open breaker rests; doubles on each re-trip, up to five times it.",
    )
    circuit_breaker_failure_ratio: Ratio = option(
        Ratio(0.5), "Share of failures in the window that opens the breaker, too."
    )
    circuit_breaker_window: Seconds = option(Seconds(30.0), "Window of the failure ratio.")
    circuit_breaker_min_requests: Count = option(
        Count(20), "Requests in the window before the ratio counts."
    )
    queue_size: Room = option(
        Room(100),
        "Requests that may wait for each model; when it is full, who has most of them waiting "
        "makes room for who has few.",
    )
    queue_timeout: Seconds = option(Seconds(10.0), "How long a request may wait for a slot.")
    lower_priority_share: Ratio = option(
        Ratio(0.1),
        "Of the turns in a queue that pass over lower classes, what they get all the same; "
        "0: none.",
    )
    max_attempts: Count = option(
        Count(3), "How often one request is sent, to all endpoints together."
    )
    retry_ambiguous: RetryAmbiguous = option(
        RetryAmbiguous.STATELESS,
        "Send a request again whose first endpoint may have begun to work on it: once if it is "
        "stateless, or never.",
    )
    retry_budget_ratio: Ratio = option(
        Ratio(0.2), "Retries and fallbacks, as a share of the last 10 s of requests."
    )
    retry_budget_floor: Rate = option(
        Rate(3.0), "Retries a second that are allowed on top of the ratio."
    )
    panic_threshold: Ratio = option(
        Ratio(0.5),
        "Below this share of healthy ones, but not at none, a model's endpoints are used whether "
        "they are healthy or not; 0: never.",
    )
    slow_start: Grace = option(
        Grace(10.0),
        "How long the share and the concurrency of an endpoint that has come back, or joins "
        "others, take to grow to what they should be; 0: none.",
    )
    models_interval: Seconds = option(
        Seconds(10.0), "Between two looks at the models that a backend lists."
    )
    dns_ttl: Seconds = option(
        Seconds(10.0),
        "Names of endpoints are looked up again after it; the system tells no time to live.  SRV "
        "records tell their own.",
    )


@attrs.frozen(kw_only=True)
class TimeoutsConfig:
    """Clocks of one request, in seconds; unset ones are bounded by request_timeout_seconds."""

    connect: Seconds | None = option(None, "TCP and TLS up; default 2.")
    headers: Seconds | None = option(None, "Request written to response head.")
    first_token: Seconds | None = option(None, "Request written to the first content of a stream.")
    first_token_per_1k_tokens: Grace | None = option(
        None,
        "Added to first_token for every 1000 tokens of the prompt, as estimated, and to "
        "request_timeout_seconds for a stream; 0: nothing.",
    )
    idle: Seconds | None = option(None, "Between two reads of a stream; default 20.")
    total: Seconds | None = option(None, "A whole stream; unbounded by default.")


@attrs.frozen(kw_only=True)
class TlsConfig:
    """TLS to endpoints whose URL begins with https; certificates are verified."""

    ca_file: str | None = option(None, "PEM certificates to trust instead of the system's.")
    server_name: str | None = option(
        None, "Name that the endpoint's certificate must have; default: the URL's host."
    )
    cert_file: str | None = option(None, "PEM certificate chain to show to the endpoint.")
    key_file: str | None = option(None, "PEM key of cert_file.")
    insecure_skip_verify: bool = option(
        False, "Accept any certificate: whoever can get in between can then read everything."
    )


@attrs.frozen(kw_only=True)
class EndpointConfig:
    """One server that answers for a model."""

    url: Url = required(
        "Base address: http://..., https://..., or unix:/path/of.sock with :/path behind it where "
        "there is one; /v1 is appended unless the path already ends in /v1."
    )
    weight: Weight | None = option(None, "Share of the load; default: the model's.")
    max_concurrent: Count | None = option(
        None, "Requests it works on at once; default: the model's."
    )
    adaptive_concurrency: bool | None = option(None, "Default: the model's.")
    min_concurrent: Count | None = option(None, "Default: the model's.")
    api_key: Secret | None = secret("Sent as a bearer token; default: the model's.")
    engine: Engine | None = option(None, "Default: the model's.")
    resolve: Resolve | None = option(None, "Default: the model's.")
    tls: TlsConfig | None = option(None, "Default: the model's.")


@attrs.frozen(kw_only=True)
class ModelConfig:
    """A model and the endpoints that serve it."""

    endpoint: Url | None = option(None, "Short form of `endpoints` with a single URL.")
    endpoints: tuple[EndpointConfig, ...] = option((), "Servers of this model.")
    endpoints_file: str | None = option(
        None,
        "YAML or JSON file with a list of more endpoints, written as in `endpoints`; read again "
        "when it has changed.  A bad one changes nothing.",
    )
    weight: Weight = option(Weight(1.0), "Share of the load.")
    max_concurrent: Count = option(Count(100), "Requests each endpoint works on at once.")
    adaptive_concurrency: bool = option(
        False,
        "Find out by measuring how many requests each endpoint should have at once, from "
        "min_concurrent to max_concurrent.",
    )
    min_concurrent: Count | None = option(
        None, "The least that adaptive_concurrency leaves; default: 4."
    )
    cost_per_request: Cost | None = option(None, "For cost-aware routing.")
    cost_per_hour: Cost | None = option(
        None, "Price of an endpoint's hour; used when cost_per_request is absent."
    )
    aliases: tuple[Name, ...] = option((), "Other names clients may ask for.")
    upstream_model: Name | None = option(None, "Name sent to the endpoints; default: the model's.")
    fallbacks: tuple[Name, ...] = option((), "Models to try, in order, when this one fails.")
    context_window: Count | None = option(None, "Tokens of prompt and answer together.")
    capabilities: tuple[Capability, ...] = option(
        tuple(Capability), "Kinds of request it can answer."
    )
    timeouts: TimeoutsConfig = option(TimeoutsConfig(), "This model's clocks.")
    hedge: bool = option(
        False,
        "Ask a second endpoint for a stream whose first token is later than 95 % of the recent "
        "ones were; the first to have one goes on.  Counts as a retry.",
    )
    hedge_after: Seconds | None = option(None, "Hedge after this, whatever the recent ones took.")
    engine: Engine = option(Engine.AUTO, "What serves it.")
    api_key: Secret | None = secret("Sent to the endpoints as a bearer token.")
    resolve: Resolve = option(
        Resolve.TOGETHER,
        "Where a name has several addresses: one endpoint together, or each one of its own; srv: "
        "each server that its SRV records name is one, at their port and with their weight.",
    )
    tls: TlsConfig = option(TlsConfig(), "How to speak TLS to the endpoints.")

    def all_endpoints(self) -> tuple[EndpointConfig, ...]:
        """Every endpoint with the model's own values filled in; the short form counts as one."""
        listed = self.endpoints
        if self.endpoint is not None:
            listed = (EndpointConfig(url=self.endpoint), *listed)
        return tuple(map(self.complete, listed))

    def complete(self, endpoint: EndpointConfig) -> EndpointConfig:
        """The endpoint with the model's own values where it has none."""
        e = endpoint
        return attrs.evolve(
            e,
            weight=e.weight if e.weight is not None else self.weight,
            max_concurrent=e.max_concurrent or self.max_concurrent,
            adaptive_concurrency=(
                self.adaptive_concurrency
                if e.adaptive_concurrency is None
                else e.adaptive_concurrency
            ),
            min_concurrent=e.min_concurrent or self.min_concurrent,
            api_key=e.api_key or self.api_key,
            engine=e.engine or self.engine,
            resolve=e.resolve or self.resolve,
            tls=e.tls or self.tls,
        )


@attrs.frozen(kw_only=True)
class PerformanceConfig:
    """Limits of the whole gateway."""

    request_timeout_seconds: Seconds = option(
        Seconds(30.0), "A whole answer, or a stream until its first token, takes at most this."
    )
    max_concurrent_requests: Count = option(
        Count(100), "Requests with all endpoints together; more wait in the queue."
    )
    rate_limiting_enabled: bool = option(True, "Apply the rate limits below.")
    rate_limit_rps: Rate = option(Rate(50.0), "Requests a second, all clients together.")
    rate_limit_burst: Count | None = option(
        None, "Requests that may come at once; default: five seconds' worth."
    )
    client_rate_limit_rps: Rate | None = option(
        None, "Requests a second for each key, or address where no key is used; default: no limit."
    )
    client_rate_limit_burst: Count | None = option(
        None, "Requests of one client that may come at once; default: five seconds' worth."
    )
    memory_limit_gb: Weight = option(
        Weight(2.0),
        "Memory of all workers together, in GiB.  From 80 % of it on connections end with their "
        "answers, from 90 % new requests are refused, from 95 % new connections wait.",
    )
    cpu_cores: Count = option(
        Count(4),
        "Cores meant for the gateway: as many workers, by default.  Enforced by the service "
        "manager (see deploy/).",
    )
    max_body_bytes: Count = option(Count(8 * 2**20), "Largest request body.")
    max_buffered_bytes: Count | None = option(
        None,
        "Request bodies and whole answers above 64 KiB, all together; what does not fit is "
        "refused before it is read.  Default: an eighth of memory_limit_gb.",
    )
    timeouts: TimeoutsConfig = option(TimeoutsConfig(), "Clocks of models that set none.")


@attrs.frozen(kw_only=True)
class StreamingConfig:
    """What becomes of streams that break, and of clients who wait for theirs."""

    continue_broken: bool = option(
        True, "Another endpoint of the model goes on with a stream whose first one has failed."
    )
    continue_max_bytes: Count = option(
        Count(256 * 1024), "Text remembered of each stream for it; a longer one is not continued."
    )
    keep_alive: Seconds | None = option(
        Seconds(10.0), "Between comments to a client whose stream is about to be continued."
    )
    keep_alive_before_first_token: Seconds | None = option(
        None,
        "Between comments to a client who waits for its first token.  The first of them sends the "
        "head, with status 200: failures after it are errors in the stream.",
    )


@attrs.frozen(kw_only=True)
class MonitoringConfig:
    """Metrics, health and logs."""

    prometheus_port: Port | None = option(
        Port(9090), "Second listener for metrics and health; null turns it off."
    )
    prometheus_host: str = option("127.0.0.1", "Address of the second listener.")
    health_check_endpoint: UrlPath = option(UrlPath("/health"), "Path of the health report.")
    metrics_endpoint: UrlPath = option(UrlPath("/metrics"), "Path of the metrics.")
    log_level: LogLevel = option(LogLevel.INFO, "Least severe log line written.")
    access_log: bool = option(True, "Write one JSON line for each request.")


@attrs.frozen(kw_only=True)
class StoreConfig:
    """What makes several gateways one: shared limits, caps, and findings about endpoints."""

    kind: StoreKind = option(
        StoreKind.AUTO,
        "auto: memory for one worker, lmdb for the workers of one host; redis for many hosts.",
    )
    path: str | None = option(None, "Folder of lmdb; default: one in the runtime folder.")
    url: StoreUrl | None = option(
        None,
        "Redis or Valkey: redis://host:6379/0, redis+sentinel://host1,host2/service, "
        "redis+cluster://host1,host2; rediss... for TLS; or unix:/path.",
    )
    username: str | None = option(None, "User of redis; default: the server's default user.")
    password: Secret | None = secret("Password of redis.")
    sentinel_username: str | None = option(None, "User of the sentinels, if they ask for one.")
    sentinel_password: Secret | None = secret("Password of the sentinels, if they ask for one.")
    tls: TlsConfig = option(TlsConfig(), "How to speak TLS to redis, for rediss://.")
    prefix: KeyPrefix = option(
        KeyPrefix("citadel"), "Keys of redis begin with it: gateways with the same one are one."
    )
    timeout: Seconds = option(
        Seconds(0.02), "A request waits this long for the store, then local limits decide."
    )
    lease: Seconds = option(
        Seconds(3.0), "After it others take over what a gateway had that has died."
    )


@attrs.frozen(kw_only=True)
class ApiKeyConfig:
    """A client's key, by its hash.  `citadel-gateway keygen` makes one."""

    id: Name = required("Names the key in logs.")
    sha256: Sha256 = required("SHA-256 of the whole key, in hexadecimal.")
    allowed_models: tuple[Name, ...] = option((), "Models it may use; default: all.")
    admin: bool = option(False, "It may cordon and drain endpoints.")
    rate_limit_rps: Rate | None = option(None, "This key's own requests a second.")
    rate_limit_burst: Count | None = option(None, "Default: five seconds' worth.")
    weight: Weight = option(
        Weight(1.0), "Its share of a model's tokens when there is a queue, relative to other keys."
    )
    max_priority: Priority = option(
        Priority.DEFAULT,
        "Class of its requests when there is a queue; x-citadel-priority can only lower it.",
    )


@attrs.frozen(kw_only=True)
class CorsConfig:
    """Which browser pages may call the gateway; none by default."""

    allow_origins: tuple[Origin, ...] = option((), "Exact origins, or '*'.")
    allow_headers: tuple[str, ...] = option(
        ("authorization", "content-type", "x-request-id"), "Headers pages may send."
    )
    max_age: Seconds = option(Seconds(600.0), "How long a browser may remember the answer.")


@attrs.frozen(kw_only=True)
class SecurityConfig:
    """Who may call, and from where."""

    api_keys: tuple[ApiKeyConfig, ...] = option((), "Keys; with none, everybody may call.")
    cors: CorsConfig = option(CorsConfig(), "Cross-origin calls.")
    trusted_proxies: tuple[Network, ...] = option(
        (), "Proxies whose X-Forwarded-For names the client."
    )


@attrs.frozen(kw_only=True)
class GatewayConfigSchema:
    """The whole configuration file."""

    service: ServiceConfig = option(ServiceConfig(), "Where the gateway listens.")
    gateway: RoutingConfig = option(RoutingConfig(), "Which model answers.")
    load_balancer: LoadBalancerConfig = option(LoadBalancerConfig(), "Which endpoint answers.")
    models: dict[Name, ModelConfig] = option({}, "The models, by the name clients ask for.")
    backends: tuple[EndpointConfig, ...] = option(
        (),
        "Servers whose models are found out: each serves those that its /v1/models lists, whether "
        "they are configured or not.",
    )
    performance: PerformanceConfig = option(PerformanceConfig(), "Limits of the whole gateway.")
    streaming: StreamingConfig = option(StreamingConfig(), "Streams that break or keep silent.")
    store: StoreConfig = option(StoreConfig(), "What several gateways share.")
    monitoring: MonitoringConfig = option(MonitoringConfig(), "Metrics, health and logs.")
    security: SecurityConfig = option(SecurityConfig(), "Keys, CORS and proxies.")

    @property
    def workers(self) -> int:
        """How many processes serve."""
        return self.service.workers or self.performance.cpu_cores

    def default_model(self) -> Name:
        """The model that answers when none is asked for and none may be chosen."""
        return self.gateway.default_model or next(iter(self.models), Name(""))

    def all_endpoints(self) -> list[EndpointConfig]:
        """Of all models, and the backends."""
        listed = [e for model in self.models.values() for e in model.all_endpoints()]
        return [*listed, *self.backends]
