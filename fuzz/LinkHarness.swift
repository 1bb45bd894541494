// SPDX-License-Identifier: Apache-2.0
// The door of the daemon: what a worker may send over its link, bytes and descriptors, is received,
// decoded and offered to the door, over a real socket.
//
// An input is: how many descriptors, a byte for the kind of each, then the packet.

import Glibc
import SystemIO
import WorkerLink

final class LinkHarness: Sendable {
  private let sender: Descriptor
  private let link: LinkConnection
  /// The file that the daemon expects, its identity, and what else a worker may send.
  private let expected: FileIdentity
  private let kinds: [PassedDescriptor]

  init() {
    do {
      let ends = try UnixSocket.pair(.packets)
      sender = try ends.first.duplicate()
      link = LinkConnection(try ends.second.duplicate())
      let path = "/tmp/dmu-fuzz-link-\(getpid())"
      let file = try Descriptor(path: path, flags: O_RDWR | O_CREAT, mode: 0o600)
      expected = try FileIdentity(file.raw, name: path)
      let others = try UnixSocket.pair(.stream)
      kinds = [
        PassedDescriptor(try Descriptor(path: path, flags: O_RDONLY)),
        PassedDescriptor(try Descriptor(path: path, flags: O_RDWR | O_APPEND)),
        PassedDescriptor(try Descriptor(path: path, flags: 0o10000000)),
        PassedDescriptor(try Descriptor(path: "/etc/passwd", flags: O_RDONLY)),
        PassedDescriptor(try Descriptor(path: "/tmp", flags: O_RDONLY)),
        PassedDescriptor(try Descriptor(path: "/dev/null", flags: O_RDWR)),
        PassedDescriptor(try Descriptor(sealedMemory: 4096, name: "fuzz")),
        PassedDescriptor(try others.first.duplicate()),
        PassedDescriptor(try ends.first.duplicate()),
        PassedDescriptor(file),
      ]
      guard unlink(path) == 0 else { throw IOError.last("remove", path) }
    } catch { fatalError("cannot begin: \(error)") }
  }

  /// Takes one input. A trap, a file that is taken for another, or a descriptor that stays open
  /// is a find.
  func use(_ input: [UInt8]) {
    let count = min(Int(input.first ?? 0) % 9, max(input.count - 1, 0))
    let chosen = input.dropFirst().prefix(count).compactMap {
      kinds[Int($0) % kinds.count].raw
    }
    let packet = Array(input.dropFirst(1 + count))
    guard !packet.isEmpty else { return }
    let before = Self.lowestFree
    do throws(IOError) {
      try PacketSocket.send(packet, descriptors: chosen, to: sender.raw)
    } catch {
      guard error.code == EMSGSIZE else { fatalError("cannot send: \(error)") }
      return
    }
    receive()
    precondition(Self.lowestFree == before, "a descriptor stays open")
  }

  private func receive() {
    do throws(LinkError) {
      guard case .message(let message, let descriptors) = try link.receive() else { return }
      let report: WorkerReport
      do throws(LinkFault) { report = try WorkerReport(message) } catch { return }
      do throws(LinkFault) {
        let again = try WorkerReport(report.message)
        precondition(again == report, "it reads back as another")
      } catch { fatalError("it does not read back: \(error)") }
      guard descriptors.roles.isSubset(of: report.roles) else { return }
      for role in descriptors.roles.sorted(by: { $0.rawValue < $1.rawValue }) {
        take(role, descriptors)
      }
    } catch {
      if case .io(let error) = error { fatalError("cannot receive: \(error)") }
    }
  }

  private func take(_ role: LinkRole, _ descriptors: LinkDescriptors) {
    do throws(IOError) {
      let writable = role != .base
      guard
        let file = try WorkerDoor.take(
          role, descriptors, of: expected, writable: writable, name: "expected")
      else { return }
      let identity = try FileIdentity(file.raw, name: "taken")
      precondition(identity == expected, "another file is taken")
      precondition(file.isWritable == writable, "it has other rights")
    } catch {
      guard error.code == EPERM else { fatalError("cannot take: \(error)") }
    }
  }

  /// The number that the next descriptor would get.
  private static var lowestFree: Int32 {
    let raw = dup(0)
    close(raw)
    return raw
  }
}
