// SPDX-License-Identifier: Apache-2.0
//
// A random run of requests, each compared with a naive model: a dictionary from path to value and
// permissions, where making a node makes its parents and removing one removes all below it.

import Testing
import TestSupport
import XenStore

/// The model. Its rules are xenstored's, written down as simply as possible.
private struct Model {
  struct Node: Equatable {
    var value: [UInt8]
    var permissions: XenStorePermissions
  }

  var nodes: [String: Node] = ["/": Node(value: [], permissions: .init(owner: 0))]

  func parent(of path: String) -> String {
    let cut = path.lastIndex(of: "/").map { path[..<$0] } ?? ""
    return cut.isEmpty ? "/" : String(cut)
  }

  /// A new node takes its permissions from its parent.
  mutating func make(_ path: String) {
    guard nodes[path] == nil else { return }
    make(parent(of: path))
    nodes[path] = Node(
      value: [], permissions: nodes[parent(of: path)]?.permissions ?? .init(owner: 0))
  }

  mutating func write(_ path: String, _ value: [UInt8]) {
    make(path)
    nodes[path]?.value = value
  }

  mutating func remove(_ path: String) {
    nodes = nodes.filter { $0.key != path && !$0.key.hasPrefix(path + "/") }
  }

  func list(_ path: String) -> [String]? {
    guard nodes[path] != nil else { return nil }
    return nodes.keys.filter { $0 != "/" && parent(of: $0) == path }
      .map { String($0[$0.index(after: $0.lastIndex(of: "/")!)...]) }.sorted()
  }
}

private enum Request: Sendable {
  case write(String, [UInt8])
  case make(String)
  case remove(String)
  case setPermissions(String, XenStorePermissions)

  static func random(using random: inout SeededRandom) -> Request {
    let path = Request.path(using: &random)
    switch Int.random(in: 0..<10, using: &random) {
    case 0..<5:
      let size = Int.random(in: 0..<40, using: &random)
      return .write(path, (0..<size).map { _ in UInt8.random(in: 0...255, using: &random) })
    case 5: return .make(path)
    case 6, 7: return .remove(path)
    default:
      let access = XenStorePermissions.Access.allCases
      let grants = (0..<Int.random(in: 0..<4, using: &random)).map { number in
        XenStorePermissions.Grant(
          DomainID(rawValue: UInt16(number + 1)), access.randomElement(using: &random) ?? .none)
      }
      return .setPermissions(
        path,
        XenStorePermissions(
          owner: DomainID(rawValue: UInt16.random(in: 0..<4, using: &random)),
          others: access.randomElement(using: &random) ?? .none, grants: grants))
    }
  }

  /// One to four names deep, few names: so that requests meet.
  static func path(using random: inout SeededRandom) -> String {
    let depth = Int.random(in: 1...4, using: &random)
    return "/m"
      + (0..<depth).map { _ in "/" + ["a", "b", "c"].randomElement(using: &random)! }
      .joined()
  }

  func apply(to model: inout Model) {
    switch self {
    case .write(let path, let value): model.write(path, value)
    case .make(let path): model.make(path)
    case .remove(let path): model.remove(path)
    case .setPermissions(let path, let permissions):
      model.nodes[path]?.permissions = permissions
    }
  }

  func apply(to session: borrowing XenStoreSession) throws(XenStoreError) {
    switch self {
    case .write(let path, let value): try session.write(path, value)
    case .make(let path): try session.makeDirectory(path)
    case .remove(let path): try session.remove(path)
    case .setPermissions(let path, let permissions):
      // A node that is not there takes none; the model says the same.
      guard try session.readIfPresent(path) != nil else { return }
      try session.setPermissions(permissions, of: path)
    }
  }
}

@Suite("Against a model") struct ModelTests {
  @Test(.timeLimit(.minutes(2))) func aRandomRunAgrees() async throws {
    var random = SeededRandom(announcedAs: "aRandomRunAgrees")
    let xenstored = try XenStored.start()
    let store = try client(of: xenstored)
    var model = Model()
    model.make("/m")
    try await store.makeDirectory("/m")
    for step in 0..<1500 {
      let requests = (0..<Int.random(in: 1...6, using: &random)).map { _ in
        Request.random(using: &random)
      }
      switch Int.random(in: 0..<4, using: &random) {
      case 0:
        try await store.transaction { session throws(XenStoreError) in
          for request in requests { try request.apply(to: session) }
        }
        for request in requests { request.apply(to: &model) }
      case 1:
        // Abandoned: the model does not move.
        await expect(.notFound) {
          try await store.transaction { session throws(XenStoreError) in
            for request in requests { try request.apply(to: session) }
            _ = try session.read("/nowhere")
          }
        }
      default:
        let request = requests[0]
        try await store.perform { session throws(XenStoreError) in
          try request.apply(to: session)
        }
        request.apply(to: &model)
      }
      try await compare(store, model, Request.path(using: &random), step, random.seed)
      if step % 100 == 99 { try await compareAll(store, model, step, random.seed) }
    }
  }

  private func compare(
    _ store: XenStoreClient, _ model: Model, _ path: String, _ step: Int, _ seed: UInt64
  ) async throws {
    let wanted = model.nodes[path]
    let place: Comment = "step \(step), seed \(seed), \(path)"
    #expect(try await store.readIfPresent(path) == wanted?.value, place)
    #expect(try await store.listIfPresent(path)?.sorted() == model.list(path), place)
    if let wanted {
      #expect(try await store.permissions(of: path) == wanted.permissions, place)
    }
  }

  private func compareAll(
    _ store: XenStoreClient, _ model: Model, _ step: Int, _ seed: UInt64
  ) async throws {
    for path in model.nodes.keys where path != "/" {
      try await compare(store, model, path, step, seed)
    }
  }
}

@Suite("Many tasks", .timeLimit(.minutes(2))) struct ConcurrencyTests {
  /// One client, 64 tasks, all kinds of requests at once; each task checks its own corner.
  @Test func shareOneClient() async throws {
    let xenstored = try XenStored.start()
    let store = try client(of: xenstored)
    try await store.write("/sum", "0")
    try await withThrowingTaskGroup(of: Void.self) { group in
      for task in 0..<64 {
        group.addTask {
          let root = "/tasks/\(task)"
          for round in 0..<20 {
            try await store.write("\(root)/\(round)", "\(task * round)")
            #expect(try await store.readString("\(root)/\(round)") == "\(task * round)")
            try await store.transaction { session throws(XenStoreError) in
              let sum = Int(try session.readString("/sum")) ?? -1
              try session.write("/sum", "\(sum + 1)")
            }
          }
          #expect(try await store.list(root).count == 20)
          let watch = try await store.watch(root)
          _ = try await events(of: watch) { $0 == .changed(root) }
          try await store.remove(root)
        }
      }
      try await group.waitForAll()
    }
    #expect(try await store.readString("/sum") == "\(64 * 20)")
    #expect(try await store.list("/tasks") == [])
  }

  /// Several xenstoreds in one process do not meet, though libxenstore takes one path alone.
  @Test func manyClientsOfManyXenstoreds() async throws {
    let instances = try (0..<4).map { _ in try XenStored.start() }
    try await withThrowingTaskGroup(of: Void.self) { group in
      for round in 0..<8 {
        for (number, instance) in instances.enumerated() {
          group.addTask {
            let store = try client(of: instance)
            try await store.write("/round/\(round)", "\(number)")
            #expect(try instance.connect().read("/round/\(round)") == "\(number)")
          }
        }
      }
      try await group.waitForAll()
    }
    for instance in instances { #expect(try instance.connect().list("/round").count == 8) }
  }
}
