// SPDX-License-Identifier: Apache-2.0
// Who has a lock on a file that only reads are wanted of. Whoever may read a file can place shared
// locks anywhere on it; a lock says that somebody writes only when its holder could.

import Glibc
internal import SystemIO

/// Looks for locks in /proc and for loop devices in /sys. What comes and goes meanwhile is skipped:
/// a writer that stays is found.
enum LockHolders {
  /// Whether somebody who has the file open for writing has a lock on one of these bytes, or the
  /// kernel writes to it as a loop device. Without the right to look into processes: true. Blocks.
  static func hasWriter(_ identity: FileIdentity, _ bytes: [Int64]) -> Bool {
    guard mayLook else { return true }
    let isLocked = FileUsers.processes().contains { pid in
      FileUsers.names(in: "/proc/\(pid)/fd").contains { name in
        FileUsers.isFile("/proc/\(pid)/fd/\(name)", identity)
          && isWriter("/proc/\(pid)/fdinfo/\(name)", bytes)
      }
    }
    return isLocked || isWrittenByLoop(identity)
  }

  /// Whether this process has CAP_SYS_PTRACE, which is bit 19. Source: capabilities(7);
  /// proc_pid_status(5), CapEff.
  private static var mayLook: Bool {
    lines("/proc/self/status").contains { words in
      guard words.first == "CapEff:", let set = words.last.flatMap({ UInt64($0, radix: 16) })
      else { return false }
      return set & 1 << 19 != 0
    }
  }

  /// Whether a descriptor, by its path in fdinfo, was opened for writing and has a lock on one of
  /// these bytes. Source: proc_pid_fdinfo(5): `lock:` as in proc_locks(5), the range at its end.
  static func isWriter(_ path: String, _ bytes: [Int64]) -> Bool {
    let lines = lines(path)
    return canWrite(lines)
      && lines.contains { words in
        guard words.first == "lock:", words.count > 3, let start = Int64(words[words.count - 2])
        else { return false }
        let end = Int64(words[words.count - 1]) ?? .max
        return bytes.contains { start <= $0 && $0 <= end }
      }
  }

  /// Whether a descriptor, by its path in fdinfo, was opened for writing.
  static func canWrite(_ path: String) -> Bool { canWrite(lines(path)) }

  /// Source: proc_pid_fdinfo(5): `flags:` in octal.
  private static func canWrite(_ lines: [[Substring]]) -> Bool {
    lines.contains { words in
      guard words.first == "flags:", let flags = words.last.flatMap({ Int32($0, radix: 8) })
      else { return false }
      return flags & O_ACCMODE != O_RDONLY
    }
  }

  private static func lines(_ path: String) -> [[Substring]] {
    do throws(IOError) {
      return try TextFile.readRepairing(path).split(separator: "\n").map {
        $0.split(whereSeparator: \.isWhitespace)
      }
    } catch { return [] }
  }

  private static func isWrittenByLoop(_ identity: FileIdentity) -> Bool {
    FileUsers.names(in: "/sys/block").contains { name in
      let folder = "/sys/block/\(name)"
      guard name.hasPrefix("loop"), FileUsers.line(folder + "/ro") == "0",
        let file = FileUsers.line(folder + "/loop/backing_file")
      else { return false }
      return FileUsers.isFile(file, identity)
    }
  }
}
