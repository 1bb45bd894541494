// SPDX-License-Identifier: Apache-2.0

import Testing
import TestSupport
import XenStore

@Suite("Requests") struct RequestTests {
  let xenstored: XenStored
  let store: XenStoreClient

  init() throws {
    xenstored = try XenStored.start()
    store = try client(of: xenstored)
  }

  @Test func writesAndReads() async throws {
    try await store.write("/a/b/c", "hello")
    #expect(try await store.readString("/a/b/c") == "hello")
    #expect(try xenstored.connect().read("/a/b/c") == "hello")
    #expect(try await store.read("/a/b") == [])
    try await store.write("/a/b/c", "")
    #expect(try await store.readString("/a/b/c") == "")
  }

  @Test func everyByteSurvives() async throws {
    let bytes = (0...255).map { UInt8($0) } + [0, 0]
    try await store.write("/binary", bytes)
    #expect(try await store.read("/binary") == bytes)
    let error = await expect(.invalidValue) { _ = try await store.readString("/binary") }
    #expect(error?.path == "/binary")
  }

  @Test func lists() async throws {
    for name in ["x", "y", "z"] { try await store.write("/dir/\(name)/deeper", name) }
    #expect(try await store.list("/dir").sorted() == ["x", "y", "z"])
    #expect(try await store.list("/dir/x/deeper") == [])
  }

  /// A directory's names do not fit into one message.
  @Test func listsManyChildren() async throws {
    let names = (0..<1500).map { "child-number-\($0)" }
    try await store.perform { session throws(XenStoreError) in
      for name in names { try session.write("/many/\(name)", "") }
    }
    #expect(try await store.list("/many").sorted() == names.sorted())
  }

  @Test func removesWithChildrenAndTwice() async throws {
    try await store.write("/tree/branch/leaf", "1")
    try await store.remove("/tree")
    #expect(try await store.readIfPresent("/tree/branch/leaf") == nil)
    try await store.remove("/tree")
    try await store.remove("/no/such/parent")
  }

  @Test func makesDirectories() async throws {
    try await store.makeDirectory("/made")
    #expect(try await store.read("/made") == [])
    try await store.write("/made", "kept")
    try await store.makeDirectory("/made")
    #expect(try await store.readString("/made") == "kept")
  }

  @Test func missingNodesAreNotFound() async throws {
    let error = await expect(.notFound) { _ = try await store.read("/not/there") }
    #expect(error?.operation == "read")
    #expect(error?.path == "/not/there")
    #expect(
      error?.description == """
        xenstore read "/not/there": no such node; check that the domain or device still exists
        """)
    await expect(.notFound) { _ = try await store.list("/not/there") }
    await expect(.notFound) { _ = try await store.permissions(of: "/not/there") }
    #expect(try await store.readIfPresent("/not/there") == nil)
    #expect(try await store.readStringIfPresent("/not/there") == nil)
    #expect(try await store.listIfPresent("/not/there") == nil)
  }

  @Test func refusesWhatXenstoredForbids() async throws {
    await expect(.refused(errno: 22)) { try await store.remove("/") }
  }

  @Test func refusesPathsThatNameNoNode() async throws {
    let paths = [
      "", "/a\0b", "/a//b", "/a/", "/with space", "/ümlaut", "/a.b", "@releaseDomain/x y",
      "/" + String(repeating: "x", count: 3072), String(repeating: "x", count: 2049),
    ]
    for path in paths {
      let error = await expect(.invalidPath) { _ = try await store.read(path) }
      #expect(error?.path == path)
      await expect(.invalidPath) { try await store.write(path, "x") }
      await expect(.invalidPath) { _ = try await store.list(path) }
      await expect(.invalidPath) { try await store.remove(path) }
      await expect(.invalidPath) { try await store.makeDirectory(path) }
      await expect(.invalidPath) { _ = try await store.permissions(of: path) }
      await expect(.invalidPath) { _ = try await store.watch(path) }
    }
  }

  /// xenstored counts 2048 bytes from the start, or from the end of `/local/domain/N/`.
  @Test func takesTheLongestPathsAndValues() async throws {
    let xenstored = try XenStored.start(options: ["--entry-size", "8192"])
    let store = try client(of: xenstored)
    let longest = [
      "/" + String(repeating: "x", count: 2047),
      "/local/domain/12345/" + String(repeating: "x", count: 2048),
    ]
    for path in longest {
      try await store.write(path, "1")
      #expect(try await store.readString(path) == "1")
      await expect(.refused(errno: 22)) { try await store.write(path + "x", "1") }
    }
    let value = [UInt8](repeating: 7, count: 4096 - "/v".utf8.count - 1)
    try await store.write("/v", value)
    #expect(try await store.read("/v") == value)
    let error = await expect(.tooLarge) { try await store.write("/v", value + [1]) }
    #expect(error?.message == "path and value have 4097 bytes, more than 4096")
    #expect(try await store.read("/v") == value)
  }

  @Test func relativePathsAreTheOwnDomains() async throws {
    try await store.write("data/x", "1")
    #expect(try await store.readString("/local/domain/0/data/x") == "1")
  }

  @Test func performIsOneGo() async throws {
    let sum = try await store.perform { session throws(XenStoreError) in
      try session.write("/one", "1")
      try session.write("/two", "2")
      return try session.list("/").count
    }
    #expect(sum >= 2)
    let error = await expect(.notFound) {
      try await store.perform { session throws(XenStoreError) in
        try session.write("/three", "3")
        _ = try session.read("/four")
      }
    }
    #expect(error?.path == "/four")
    #expect(try await store.readString("/three") == "3")
  }

  @Test func knowsDomains() async throws {
    #expect(try await store.domainPath(7) == "/local/domain/7")
    #expect(try await store.isIntroduced(7) == false)
    let wire = try xenstored.connect()
    try wire.introduce(domain: 7)
    #expect(try await store.isIntroduced(7))
    try wire.release(domain: 7)
    #expect(try await store.isIntroduced(7) == false)
  }
}

@Suite("Permissions") struct PermissionTests {
  @Test func survivesTheRoundTrip() async throws {
    let xenstored = try XenStored.start()
    let store = try client(of: xenstored)
    try await store.write("/p", "x")
    #expect(try await store.permissions(of: "/p") == XenStorePermissions(owner: 0))
    let wanted = XenStorePermissions(
      owner: 5, others: .read,
      grants: [.init(0, .none), .init(7, .write), .init(8, .both), .init(9, .read)])
    try await store.setPermissions(wanted, of: "/p")
    #expect(try await store.permissions(of: "/p") == wanted)
    #expect(try xenstored.connect().permissions(of: "/p") == ["r5", "n0", "w7", "b8", "r9"])
    #expect("\(wanted)" == "r5,n0,w7,b8,r9")
    await expect(.notFound) { try await store.setPermissions(wanted, of: "/q") }
  }

  @Test func readsAndWritesText() {
    for text in ["n0", "n0,r5", "b1,w2,n3,r32751"] {
      #expect(XenStorePermissions(text)?.description == text)
    }
    for text in ["", "n", "x0", "n0,", "n-1", "n0 ,r5", "n99999", "0n", "n+1"] {
      #expect(XenStorePermissions(text) == nil, "\(text)")
    }
  }

  @Test func domainIDsAreDecimalNumbersBelowTheReservedOnes() {
    #expect(DomainID("0") == 0)
    #expect(DomainID("32751") == 32751)
    for text in ["", "32752", "+1", "-1", " 1", "0x1", "1 "] { #expect(DomainID(text) == nil) }
  }
}
