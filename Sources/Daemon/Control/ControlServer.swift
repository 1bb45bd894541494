// SPDX-License-Identifier: Apache-2.0
// The control socket: a Unix socket for root, one JSON object a line each way.
//
// Invariants:
// - Only root is listened to, and whoever the daemon itself runs as (in tests it is not
//   root); the kernel says who connected.
// - A line has a longest length, a connection has a longest life without a word, there is
//   a most number of connections, and a client that does not read its reply is cut off:
//   nobody but itself waits for a client.

internal import FoundationEssentials
import Glibc
internal import Logging
internal import NIOCore
internal import NIOPosix
internal import ServiceLifecycle
import Synchronization
internal import SystemIO

/// Answers the admin's commands and the block scripts.
struct ControlServer: Service {
  /// More connections than these are closed at once.
  static let mostConnections = 256
  /// A connection that says nothing for so long is closed; a reply may take so long to read.
  static let patience = TimeAmount.seconds(60)

  let path: String
  let reconciler: Reconciler
  let keeper: RunDirectoryKeeper
  let manager: ServiceManager?
  let log: Logger

  func run() async throws {
    let group = MultiThreadedEventLoopGroup(numberOfThreads: 1)
    let result: Result<Void, any Error>
    do {
      try await withThrowingDiscardingTaskGroup { tasks in
        tasks.addTask { try await serve(group) { manager?.ready() } }
        tasks.addTask { await serveAgain(group) }
      }
      result = .success(())
    } catch { result = .failure(error) }
    try await group.shutdownGracefully()
    try result.get()
  }

  /// Listens in a run directory that was made anew; who was connected before stays so.
  private func serveAgain(_ group: MultiThreadedEventLoopGroup) async {
    await withDiscardingTaskGroup { tasks in
      for await _ in keeper.remade.cancelOnGracefulShutdown() {
        tasks.addTask {
          do { try await serve(group) {} } catch {
            log.error("cannot listen again", metadata: ["error": "\(error)"])
          }
        }
      }
    }
  }

  /// `ready`: called when connections are taken.
  private func serve(
    _ group: MultiThreadedEventLoopGroup, ready: @Sendable () -> Void
  ) async throws {
    // The run directory is locked for this daemon. One that was killed may still be listening, if
    // the kernel cannot end it.
    let listener = try UnixSocket.listen(at: path, kind: .stream, mode: 0o600, replacing: true)
    let server = try await ServerBootstrap(group: group)
      .serverChannelOption(.backlog, value: 64)
      .bind(listener.release()) { channel in
        channel.eventLoop.makeCompletedFuture {
          let idle = IdleCloser()
          try channel.pipeline.syncOperations.addHandlers(
            ByteToMessageHandler(LineDecoder()), LineEncoder(),
            IdleStateHandler(allTimeout: ControlServer.patience), idle)
          return Connection(
            channel: try NIOAsyncChannel(wrappingChannelSynchronously: channel), idle: idle)
        }
      }
    log.debug("listening", metadata: ["path": "\(path)"])
    let open = OpenConnections()
    try await withGracefulShutdownHandler {
      try await withThrowingDiscardingTaskGroup { tasks in
        try await server.executeThenClose { connections in
          ready()
          for try await connection in connections {
            let number = open.count.add(1, ordering: .relaxed).newValue
            tasks.addTask {
              await self.handle(connection, isOneTooMany: number > ControlServer.mostConnections)
              open.count.subtract(1, ordering: .relaxed)
            }
          }
        }
      }
    } onGracefulShutdown: {
      server.channel.close(promise: nil)
      // Whoever waits for a disk asks the next daemon.
      Task { await reconciler.refuseAllWaiters() }
    }
    guard unlink(path) == 0 || errno == ENOENT else { throw SystemIO.IOError.last("remove", path) }
  }

  /// A client's connection, and what cuts it off when it is silent.
  private struct Connection: Sendable {
    let channel: NIOAsyncChannel<[UInt8], [UInt8]>
    let idle: IdleCloser
  }

  private func handle(_ connection: Connection, isOneTooMany: Bool) async {
    do {
      let (channel, idle) = (connection.channel, connection.idle)
      try await channel.executeThenClose { lines, replies in
        guard !isOneTooMany else {
          log.warning("too many connections on the control socket")
          return
        }
        guard try await isAllowed(channel.channel) else { return }
        for try await line in lines {
          // A client that waits for its answer is silent, too.
          idle.isAnswering.store(true, ordering: .relaxed)
          let reply = try await answer(line)
          idle.isAnswering.store(false, ordering: .relaxed)
          try await replies.write(try ControlLine.encode(reply) + [10])
        }
      }
    } catch is LineTooLong {
      log.warning("a client sent too long a line and was cut off")
    } catch let error as SystemIO.IOError {
      log.warning("a client was cut off", metadata: ["error": "\(error)"])
    } catch {
      // Clients come and go: one that leaves in the middle is nobody's trouble.
      log.debug("a client has gone", metadata: ["reason": "\(error)"])
    }
  }

  private func isAllowed(_ channel: any Channel) async throws -> Bool {
    guard let provider = channel as? any SocketOptionProvider else {
      throw SystemIO.IOError(ENOTSUP, "examine the peer of", path)
    }
    let peer: PeerWords = try await provider.unsafeGetSocketOption(
      level: .socket, name: .init(rawValue: SO_PEERCRED)
    ).get()
    if peer.uid == 0 || peer.uid == geteuid() { return true }
    log.warning(
      "refused a client that is not root",
      metadata: ["uid": "\(peer.uid)", "pid": "\(peer.pid)"])
    return false
  }

  private func answer(_ line: [UInt8]) async throws -> ControlReply {
    let request: ControlRequest
    do { request = try ControlLine.decode(ControlRequest.self, line) } catch {
      let commands = ControlRequest.Command.allCases.map(\.rawValue).joined(separator: ", ")
      return ControlReply(
        ok: false, error: "this is not a request: send {\"command\":...} with one of \(commands)")
    }
    switch request.command {
    case .version:
      var reply = ControlReply.done
      reply.version = Version.text
      reply.pid = getpid()
      return reply
    case .status, .metrics, .recover, .pending, .discard, .clear, .forget, .leftovers, .clean,
      .detachNamed, .deactivate:
      do throws(DiskFailure) { return try await obey(request) } catch { return .failure(error) }
    case .reload:
      do throws(ConfigurationError) { try await reconciler.reload() } catch {
        return ControlReply(
          ok: false, error: "\(error): the running configuration stays in force")
      }
      return .done
    case .attach, .detach: return await hotplug(request)
    case .attachNamed: return await attachNamed(request)
    case .activate:
      do throws(DiskFailure) {
        let name = try name(request)
        return reply(await reconciler.activate(name), path: reconciler.host.links.path(name))
      } catch { return .failure(error) }
    }
  }

  private func obey(_ request: ControlRequest) async throws(DiskFailure) -> ControlReply {
    var reply = ControlReply.done
    let store = request.store ?? ""
    switch request.command {
    case .status: reply.disks = try await reconciler.status(domain: request.domain)
    case .metrics: reply.disks = try await reconciler.metrics(domain: request.domain)
    case .recover: reply.stores = try await reconciler.recover(store: request.store)
    case .pending: reply.stores = [try await reconciler.pending(of: store)]
    case .discard: reply.stores = [try await reconciler.discard(store)]
    case .clear: reply.disks = try await reconciler.clear(request.target ?? "")
    case .forget: reply.count = await reconciler.forget(request.target)
    case .leftovers: reply.leftovers = try await reconciler.leftovers()
    case .clean: try await reconciler.clean(request.target ?? "")
    case .detachNamed: try await reconciler.detach(try name(request))
    case .deactivate: try await reconciler.deactivate(try name(request))
    case .attach, .detach, .attachNamed, .activate, .reload, .version: break
    }
    return reply
  }

  private func hotplug(_ request: ControlRequest) async -> ControlReply {
    guard let path = request.path, let id = VBD(path: path).map(DiskID.vbd) else {
      return ControlReply(
        ok: false,
        error: "'\(ForeignText.shown(request.path ?? ""))' is not a disk's path in xenstore:"
          + " give backend/vbd/DOMAIN/DEVICE")
    }
    guard request.command == .attach else {
      await reconciler.detach(id)
      return .done
    }
    return reply(await reconciler.attach(id, boots: request.boots ?? false))
  }

  private func attachNamed(_ request: ControlRequest) async -> ControlReply {
    do throws(DiskFailure) {
      let name = try name(request)
      var wish = NamedWish(
        params: request.spec ?? "", readOnly: request.readOnly ?? false,
        isProbed: request.probe ?? false)
      if let owner = request.owner {
        guard let id = OwnerID(owner) else { throw .ownerBad(owner) }
        wish.owner = id
      }
      if request.inactive == true {
        try await reconciler.keep(name, wish)
        return .done
      }
      let result = await reconciler.attach(name, wish, create: request.create ?? false)
      return reply(result, path: reconciler.host.links.path(name))
    } catch { return .failure(error) }
  }

  private func name(_ request: ControlRequest) throws(DiskFailure) -> DiskName {
    let text = request.name ?? ""
    guard let name = DiskName(text) else { throw .nameBad(text) }
    return name
  }

  /// `path`: where the device is looked for, if not by its own name.
  private func reply(
    _ result: Result<DeviceNode, DiskFailure>, path: String? = nil
  ) -> ControlReply {
    switch result {
    case .failure(let failure): return .failure(failure)
    case .success(let device):
      var reply = ControlReply.done
      reply.device = ControlReply.Device(path: path ?? device.path, number: device.hexadecimal)
      return reply
    }
  }
}

/// How many connections are open.
private final class OpenConnections: Sendable {
  let count = Atomic(0)
}

/// What SO_PEERCRED answers. Source: unix(7), struct ucred.
private struct PeerWords: Sendable {
  var pid: Int32
  var uid: UInt32
  var gid: UInt32
}

/// A client's line is longer than any request.
struct LineTooLong: Error {}

/// Cuts the stream of bytes at newlines.
private struct LineDecoder: ByteToMessageDecoder {
  typealias InboundOut = [UInt8]

  mutating func decode(
    context: ChannelHandlerContext, buffer: inout ByteBuffer
  ) throws -> DecodingState {
    guard let length = buffer.readableBytesView.firstIndex(of: 10) else {
      guard buffer.readableBytes <= ControlLine.longestRequest else { throw LineTooLong() }
      return .needMoreData
    }
    let count = length - buffer.readerIndex
    guard count <= ControlLine.longestRequest, let line = buffer.readBytes(length: count) else {
      throw LineTooLong()
    }
    buffer.moveReaderIndex(forwardBy: 1)
    context.fireChannelRead(wrapInboundOut(line))
    return .continue
  }

  mutating func decodeLast(
    context: ChannelHandlerContext, buffer: inout ByteBuffer, seenEOF: Bool
  ) throws -> DecodingState {
    // A line without its newline is half a request.
    .needMoreData
  }
}

/// Puts replies into buffers.
private final class LineEncoder: ChannelOutboundHandler, Sendable {
  typealias OutboundIn = [UInt8]
  typealias OutboundOut = ByteBuffer

  func write(
    context: ChannelHandlerContext, data: NIOAny, promise: EventLoopPromise<Void>?
  ) {
    let buffer = context.channel.allocator.buffer(bytes: unwrapOutboundIn(data))
    context.write(wrapOutboundOut(buffer), promise: promise)
  }
}

/// Closes a connection on which nothing has happened for long.
private final class IdleCloser: ChannelInboundHandler, Sendable {
  typealias InboundIn = [UInt8]
  typealias InboundOut = [UInt8]

  /// Whether the daemon is at work for it.
  let isAnswering = Atomic(false)

  func userInboundEventTriggered(context: ChannelHandlerContext, event: Any) {
    if event is IdleStateHandler.IdleStateEvent {
      if !isAnswering.load(ordering: .relaxed) { context.close(promise: nil) }
    } else {
      context.fireUserInboundEventTriggered(event)
    }
  }
}
