// SPDX-License-Identifier: Apache-2.0
// A disk at a Unix socket, for whoever speaks NBD.

import Glibc
import SystemIO
import WorkerLink

/// A disk at a Unix socket.
final class SocketService: DiskService {
  private let path: String
  private let log: Log
  private let device: UInt
  private let inode: UInt

  init(_ disk: KeptDisk, path: String, _ log: Log) throws(WorkerError) {
    self.path = path
    self.log = log
    let listener: Descriptor
    do throws(IOError) {
      listener = try UnixSocket.listen(at: path, kind: .stream)
    } catch {
      guard error.code == EADDRINUSE else { throw WorkerError(error) }
      throw WorkerError(
        .inUse, "\(path) is in use: end the program that listens there, or choose another path")
    }
    var status = stat()
    guard lstat(path, &status) == 0 else { throw WorkerError(IOError.last("examine", path)) }
    device = UInt(status.st_dev)
    inode = UInt(status.st_ino)
    do throws(WorkerError) {
      try disk.attach(.listener, listener.raw)
    } catch {
      withdraw()
      throw error
    }
  }

  var greeting: String { "nbdinfo '\(Self.uri(path))'" }

  /// An address as NBD clients take it. Source: the NBD URI specification.
  static func uri(_ path: String) -> String {
    var absolute = path
    if !path.hasPrefix("/"), let folder = getcwd(nil, 0) {
      absolute = String(cString: folder) + "/" + path
      free(folder)
    }
    let plain = Set("/-._~".utf8)
    let digits = Array("0123456789ABCDEF")
    var encoded = ""
    for byte in absolute.utf8 {
      let letter = (0x30...0x39).contains(byte) || (0x41...0x5a).contains(byte & 0xdf)
      if letter || plain.contains(byte) {
        encoded.unicodeScalars.append(Unicode.Scalar(byte))
      } else {
        encoded += "%\(digits[Int(byte >> 4)])\(digits[Int(byte & 15)])"
      }
    }
    return "nbd+unix:///?socket=" + encoded
  }

  /// Clients come and go, and this is not told of them.
  func detached() {}

  /// The next to listen there replaces the socket file, and may have done so already.
  func workerEnded() {}

  /// Removes the socket file, unless somebody has put another in its place.
  func withdraw() {
    var status = stat()
    guard lstat(path, &status) == 0, UInt(status.st_dev) == device, UInt(status.st_ino) == inode
    else { return }
    if unlink(path) != 0 {
      log(.warning, "the socket is left behind", ["error": "\(IOError.last("remove", path))"])
    }
  }
}
