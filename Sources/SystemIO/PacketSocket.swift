// SPDX-License-Identifier: Apache-2.0
// Packets with descriptors over a connected SOCK_SEQPACKET socket. Nothing here waits.

internal import CLinux
import Glibc
import Synchronization

/// A descriptor that came with a packet: closed with this object, unless taken.
package final class PassedDescriptor: Sendable {
  private let number: Mutex<Int32>
  private let closer: Closer?

  /// Takes over an owned descriptor. With a closer, that closes it: its peer is not trusted.
  package init(_ descriptor: consuming Descriptor, closer: Closer? = nil) {
    number = Mutex(descriptor.release())
    self.closer = closer
  }

  deinit {
    let raw = number.withLock { $0 }
    guard raw >= 0 else { return }
    if let closer { closer.close(raw) } else { _ = Glibc.close(raw) }
  }

  /// The number, lent; nil when it has been taken.
  package var raw: Int32? {
    number.withLock { $0 >= 0 ? $0 : nil }
  }

  /// Gives ownership to the caller, once.
  package func take() -> Descriptor? {
    let raw = number.withLock { number in
      defer { number = -1 }
      return number
    }
    return raw >= 0 ? Descriptor(owning: raw) : nil
  }
}

/// What one receive brought.
package enum Packet: Sendable {
  /// Bytes, and the descriptors that came with them.
  case packet([UInt8], [PassedDescriptor])
  /// A packet that was too long or carried too many descriptors, which are closed.
  case tooLarge
  /// Nothing there now.
  case none
  /// The peer has closed, or is gone.
  case end
}

/// Sending and receiving packets.
package enum PacketSocket {
  /// The most descriptors in one packet; one that carries more is too large.
  package static let maxDescriptors = Int(DMU_MAX_DESCRIPTORS)

  /// Sends a packet with descriptors, which stay the caller's. Throws: EAGAIN when the peer
  /// does not read, EPIPE or ECONNRESET when it is gone, and the other errnos of sendmsg(2).
  package static func send(
    _ bytes: [UInt8], descriptors: [Int32] = [], to socket: Int32
  ) throws(IOError) {
    let result = bytes.withUnsafeBytes { bytes in
      descriptors.withUnsafeBufferPointer { numbers in
        var result: Int
        repeat {
          result = dmu_send_message(
            socket, bytes.baseAddress, bytes.count, numbers.baseAddress, numbers.count)
        } while result < 0 && errno == EINTR
        return result
      }
    }
    guard result == bytes.count else { throw IOError.last("send a packet") }
  }

  /// Receives the next packet of at most `limit` bytes, if there is one. Descriptors that nobody
  /// takes are closed by `closer`, if there is one. Throws: the errno of recvmsg(2).
  package static func receive(
    from socket: Int32, limit: Int, closer: Closer? = nil
  ) throws(IOError) -> Packet {
    let room = Int(DMU_DESCRIPTOR_ROOM)
    var numbers = [Int32](repeating: -1, count: room)
    var count = room
    var truncated: Int32 = 0
    var result = 0
    let bytes = [UInt8](unsafeUninitializedCapacity: limit) { buffer, filled in
      repeat {
        count = room
        result = dmu_receive_message(
          socket, buffer.baseAddress, limit, &numbers, &count, &truncated)
      } while result < 0 && errno == EINTR
      filled = max(0, result)
    }
    if result < 0 {
      switch errno {
      case EAGAIN: return .none
      case ECONNRESET, EPIPE: return .end
      default: throw IOError.last("receive a packet")
      }
    }
    let descriptors = numbers[..<count].map {
      PassedDescriptor(Descriptor(owning: $0), closer: closer)
    }
    if truncated != 0 || count > maxDescriptors { return .tooLarge }
    return result == 0 ? .end : .packet(bytes, descriptors)
  }
}
