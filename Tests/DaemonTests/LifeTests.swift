// SPDX-License-Identifier: Apache-2.0
// The life of disks, with real workers: coming, being served, trouble, going.

import BlockIO
import Daemon
import Fakes
import Glibc
import Testing
import TestSupport

@Suite(.serialized, .enabled(if: Programs.arePresent, "the programs have to be built first"))
struct LifeTests {
  @Test("A disk comes, its store is made, it is told of, it goes and leaves nothing")
  func wholeLife() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      let device = try await world.add(disk)
      #expect(device.number == "2b:0")
      #expect(device.path == "/stand-in/nbd0")
      let status = try #require(try await world.status(5).first)
      #expect(status.state == .ready)
      #expect(status.size == 1 << 20)
      #expect(status.domainName == "guest5")
      #expect(status.vdev == "xvda")
      try await eventually("the nodes") { try world.node(disk, "state") == "ready" }
      #expect(try world.node(disk, "device") == device.path)
      #expect(try world.node(disk, "worker") == "\(try await world.worker(disk))")
      try await eventually("it is counted") {
        try world.toolstack.read("/local/domain/0/dmu-xen/disks") == "1"
      }
      var store = stat()
      #expect(stat(world.folder.file("g5.dscow"), &store) == 0)
      #expect(store.st_mode & 0o777 == 0o600)

      let worker = try await world.worker(disk)
      try world.detach(disk)
      try await eventually("the worker has ended") { !isAlive(worker) }
      try await eventually("its directory has gone") { world.directories().isEmpty }
      #expect(try world.devices == 0)
      #expect(try world.toolstack.read(disk.backend) == nil, "no node was made again")
      try await eventually("it is forgotten") { try await world.status().isEmpty }
    }
  }

  @Test("Disks that were there before the daemon are taken up alike")
  func before() async throws {
    try await inWorld(daemon: false) { world in
      let first = try world.attach(5, world.spec("g5.dscow"))
      let second = try world.attach(6, world.spec("g6.dscow"), writable: false)
      try world.attach(7, "/dev/vg/other")
      for name in ["g5.dscow", "g6.dscow"] { try await world.makeStore(name) }
      try await world.startDaemon()
      for disk in [first, second] {
        try await eventually("both are ready") { try await world.state(disk) == .ready }
      }
      #expect(try await world.status().count == 2)
      #expect(try await world.status(6).first?.readOnly == true)
    }
  }

  @Test("What a guest wrote is read back by its next life")
  func dataStays() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      do {
        let wire = try world.wire()
        #expect(try wire.read(512, at: 0) == [UInt8](repeating: 0xB5, count: 512))
        #expect(try wire.write([UInt8](repeating: 7, count: 4096), at: 8192) == 0)
      }
      #expect(try await world.status(5).first?.allocated ?? 0 > 0)
      try world.detach(disk)
      try await eventually("it is gone") { world.directories().isEmpty }
      let again = try world.attach(6, world.spec("g5.dscow"))
      try await world.add(again)
      let wire = try world.wire()
      #expect(try wire.read(4096, at: 8192) == [UInt8](repeating: 7, count: 4096))
      #expect(try wire.read(512, at: 0) == [UInt8](repeating: 0xB5, count: 512))
    }
  }

  @Test("On a reboot the new domain waits for the old one's worker: never two on a store")
  func reboot() async throws {
    try await inWorld { world in
      let old = try world.attach(5, world.spec("g.dscow"))
      try await world.add(old)
      let worker = try await world.worker(old)
      kill(worker, SIGSTOP)
      try world.toolstack.beginDetach(old)
      let new = try world.attach(6, world.spec("g.dscow"))
      try await eventually("it waits") {
        try await world.status(6).first?.error?.contains("waiting for domain 5") == true
      }
      try world.toolstack.backendCloses(old)
      try world.toolstack.finishDetach(old)
      try world.toolstack.destroyDomain(5)
      kill(worker, SIGCONT)
      #expect(try await world.add(new).number == "2b:0")
      #expect(!isAlive(worker))
    }
  }

  @Test("A domain that was destroyed takes its disk with it, whatever its nodes say")
  func destroyed() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      try world.toolstack.connect(disk, sectors: 2048)
      try world.toolstack.destroyDomain(5)
      try await eventually("its worker is gone") { world.directories().isEmpty }
    }
  }

  @Test("A disk that is taken away while it waits for its store does not take it any more")
  func takenAwayWhileWaiting() async throws {
    try await inWorld { world in
      try await world.makeStore("g5.dscow")
      let started = world.folder.file("started")
      try world.useWorkers("touch '\(started)'; exec")
      do {
        let other = try FileStore(path: world.folder.file("g5.dscow"), writable: true)
        try other.lock(exclusive: true)
        let disk = try world.attach(5, world.spec("g5.dscow"))
        try await eventually("it waits") {
          try await world.status(5).first?.error?.contains("to let go of the store") == true
        }
        try world.detach(disk)
      }
      try await Task.sleep(for: .milliseconds(600))
      #expect(access(started, F_OK) != 0, "no worker was started for it")
      #expect(try await world.status().isEmpty)
    }
  }

  @Test("The leftovers of a failed attach keep no worker")
  func leftovers() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      try world.toolstack.write(disk.backend + "/hotplug-status", "error")
      try await eventually("its worker is gone") { world.directories().isEmpty }
    }
  }

  @Test("`remove` lets go of a disk whose nodes stay, and a later `add` takes it up again")
  func removeThenAdd() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      #expect(try await world.command { $0.remove(disk.relativeBackend) } == .done)
      #expect(try await world.command { $0.remove(disk.relativeBackend) } == .done)
      try await eventually("its worker is gone") { world.directories().isEmpty }
      try world.toolstack.write(disk.backend + "/state", "2")
      try await Task.sleep(for: .milliseconds(300))
      #expect(world.directories().isEmpty, "an event alone does not bring it back")
      try await world.add(disk)
      #expect(try await world.state(disk) == .ready)
    }
  }

  @Test("An entry that is made anew between two looks: the same disk goes on, another replaces it")
  func madeAnew() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      try await eventually("it is told") { try world.node(disk, "state") == "ready" }
      try world.toolstack.attach(disk)
      try await eventually("it is told again") { try world.node(disk, "state") == "ready" }
      #expect(try await world.worker(disk) == worker)
      var other = disk
      other.params = world.spec("other.dscow")
      try await world.makeStore("other.dscow")
      try world.toolstack.attach(other)
      try await eventually("the other is served") {
        let status = try await world.status(5).first
        return status?.state == .ready && status?.store == world.folder.file("other.dscow")
      }
      #expect(!isAlive(worker))
      #expect(try world.devices == 1)
    }
  }

  @Test("xenstored loses its memory: disks in use stay, and go when it speaks of them again")
  func amnesia() async throws {
    try await inWorld { world in
      let disk = try world.attach(5, world.spec("g5.dscow"))
      try await world.add(disk)
      let worker = try await world.worker(disk)
      try world.xenstored.restart(keepingData: false)
      try await eventually("the daemon is back") {
        try FakeToolstack(world.xenstored).read("/local/domain/0/dmu-xen/state") == "running"
      }
      try await Task.sleep(for: .milliseconds(300))
      #expect(isAlive(worker))
      #expect(try await world.state(disk) == .ready)
    }
  }
}
