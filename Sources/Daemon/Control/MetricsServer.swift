// SPDX-License-Identifier: Apache-2.0
// Metrics over HTTP, for Prometheus: GET /metrics, in the format that the client accepts.
//
// Invariants:
// - It listens on a Unix socket or a loopback address only, and tells nothing that a configuration
//   of a disk holds but names: whoever may connect may read.
// - However often clients ask, disks are looked at once a second at most.
// - Connections are bounded in number and in silence. A client that does not read is cut off.
// - If it cannot listen, disks are served all the same.

import Glibc
internal import Logging
internal import NIOCore
internal import NIOHTTP1
internal import NIOPosix
internal import ServiceLifecycle
import Synchronization
internal import SystemIO

/// Serves metrics.
struct MetricsServer: Service {
  /// More connections than these are closed at once.
  static let mostConnections = 32
  /// A connection on which nothing happens for so long is closed.
  static let patience = TimeAmount.seconds(60)

  let address: MetricsAddress
  let reconciler: Reconciler
  let log: Logger

  func run() async throws {
    let group = MultiThreadedEventLoopGroup(numberOfThreads: 1)
    do {
      let server = try await listen(group)
      log.info("metrics are served", metadata: ["address": "\(address)"])
      try await withGracefulShutdownHandler {
        try await server.closeFuture.get()
      } onGracefulShutdown: {
        server.close(promise: nil)
      }
      if case .unix(let path) = address, unlink(path) != 0, errno != ENOENT {
        throw SystemIO.IOError.last("remove", path)
      }
    } catch {
      log.error(
        "metrics cannot be served", metadata: ["address": "\(address)", "reason": "\(why(error))"])
      try await group.shutdownGracefully()
      return try await gracefulShutdown()
    }
    try await group.shutdownGracefully()
  }

  /// The reason, with what to do about it.
  private func why(_ error: any Error) -> String {
    let code = (error as? NIOCore.IOError)?.errnoCode ?? (error as? SystemIO.IOError)?.code
    switch code {
    case EAFNOSUPPORT, EPERM, EACCES:
      return "\(error): let dmu-xend's unit use this family of addresses, or give a Unix socket"
    case EADDRINUSE: return "\(error): give another port in metrics.listen"
    default: return "\(error): see metrics.listen in the configuration"
    }
  }

  private func listen(_ group: MultiThreadedEventLoopGroup) async throws -> any Channel {
    let source = MetricsSource(reconciler: reconciler)
    let open = OpenClients()
    let bootstrap = ServerBootstrap(group: group)
      .serverChannelOption(.backlog, value: 16)
      .serverChannelOption(.socketOption(.so_reuseaddr), value: 1)
      .childChannelInitializer { channel in
        guard open.count.add(1, ordering: .relaxed).newValue <= MetricsServer.mostConnections
        else {
          open.count.subtract(1, ordering: .relaxed)
          return channel.close()
        }
        channel.closeFuture.whenComplete { _ in open.count.subtract(1, ordering: .relaxed) }
        return channel.eventLoop.makeCompletedFuture {
          try channel.pipeline.syncOperations.configureHTTPServerPipeline(withErrorHandling: true)
          try channel.pipeline.syncOperations.addHandlers(
            IdleStateHandler(allTimeout: MetricsServer.patience), MetricsHandler(source: source))
        }
      }
    switch address {
    case .loopback(let host, let port):
      return try await bootstrap.bind(host: host, port: port).get()
    case .unix(let path):
      // The directory decides who may connect beside root: its group, if it passes that on.
      let listener = try UnixSocket.listen(at: path, kind: .stream, mode: 0o660, replacing: true)
      return try await bootstrap.withBoundSocket(listener.release()).get()
    }
  }
}

/// How many connections are open.
private final class OpenClients: Sendable {
  let count = Atomic(0)
}

/// One look at all disks for all that ask within a second.
private actor MetricsSource {
  private typealias Look = Result<[DiskStatus], DiskFailure>

  private let reconciler: Reconciler
  private var last: (look: Task<Look, Never>, at: ContinuousClock.Instant)?

  init(reconciler: Reconciler) { self.reconciler = reconciler }

  /// The text of the metrics.
  func text(_ format: MetricsFormat) async throws -> String {
    let look: Task<Look, Never>
    if let last, .now - last.at < .seconds(1) {
      look = last.look
    } else {
      let reconciler = reconciler
      look = Task {
        do throws(DiskFailure) {
          return .success(try await reconciler.metrics(domain: nil))
        } catch { return .failure(error) }
      }
      last = (look, .now)
    }
    return MetricsText.render(try await look.value.get(), format)
  }
}

/// Answers the requests of one connection, one at a time: the pipeline holds further ones back.
private final class MetricsHandler: ChannelInboundHandler {
  typealias InboundIn = HTTPServerRequestPart
  typealias OutboundOut = HTTPServerResponsePart

  private let source: MetricsSource
  private var request: HTTPRequestHead?

  init(source: MetricsSource) { self.source = source }

  func channelRead(context: ChannelHandlerContext, data: NIOAny) {
    switch unwrapInboundIn(data) {
    case .head(let head): request = head
    case .body: break
    case .end:
      guard let head = request else { return }
      request = nil
      answer(head, context)
    }
  }

  func userInboundEventTriggered(context: ChannelHandlerContext, event: Any) {
    if event is IdleStateHandler.IdleStateEvent {
      context.close(promise: nil)
    } else {
      context.fireUserInboundEventTriggered(event)
    }
  }

  func errorCaught(context: ChannelHandlerContext, error: any Error) {
    // A client that has gone, or that does not speak HTTP.
    context.close(promise: nil)
  }

  private func answer(_ head: HTTPRequestHead, _ context: ChannelHandlerContext) {
    guard head.method == .GET || head.method == .HEAD else {
      return respond(context, head, .methodNotAllowed, "only GET is served here\n")
    }
    guard head.uri.prefix(while: { $0 != "?" }) == "/metrics" else {
      return respond(context, head, .notFound, "metrics are at /metrics\n")
    }
    let accepted = head.headers[canonicalForm: "accept"]
    let wantsOpen = accepted.contains { $0.lowercased().hasPrefix("application/openmetrics-text") }
    let format = wantsOpen ? MetricsFormat.openmetrics : .prometheus
    let bound = NIOLoopBound((self, context), eventLoop: context.eventLoop)
    let promise = context.eventLoop.makePromise(of: String.self)
    let source = source
    promise.completeWithTask { try await source.text(format) }
    promise.futureResult.whenComplete { result in
      let (handler, context) = bound.value
      switch result {
      case .success(let text):
        handler.respond(context, head, .ok, text, type: format.contentType)
      case .failure(let error):
        handler.respond(context, head, .internalServerError, "\(error)\n")
      }
    }
  }

  private func respond(
    _ context: ChannelHandlerContext, _ head: HTTPRequestHead, _ status: HTTPResponseStatus,
    _ text: String, type: String = "text/plain; charset=utf-8"
  ) {
    guard context.channel.isActive else { return }
    var headers = HTTPHeaders()
    headers.add(name: "content-type", value: type)
    headers.add(name: "content-length", value: "\(text.utf8.count)")
    if !head.isKeepAlive { headers.add(name: "connection", value: "close") }
    let answer = HTTPResponseHead(version: head.version, status: status, headers: headers)
    context.write(wrapOutboundOut(.head(answer)), promise: nil)
    if head.method != .HEAD {
      let body = context.channel.allocator.buffer(string: text)
      context.write(wrapOutboundOut(.body(.byteBuffer(body))), promise: nil)
    }
    let isLast = !head.isKeepAlive
    let bound = NIOLoopBound(context, eventLoop: context.eventLoop)
    context.writeAndFlush(wrapOutboundOut(.end(nil))).whenComplete { _ in
      if isLast { bound.value.close(promise: nil) }
    }
  }
}
