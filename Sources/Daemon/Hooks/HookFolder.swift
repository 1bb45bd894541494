// SPDX-License-Identifier: Apache-2.0
// Where hooks are, and whether they may be run: as root, so that nobody else may have written them.
//
//     hooks/SCHEME         attaches and detaches sources
//     hooks/events.d/*     are told what has happened to a disk

import Glibc
internal import SystemIO

/// The folder of hooks. All calls block.
struct HookFolder: Sendable {
  /// Path of the folder.
  let path: String
  private static let suffix = ".toml"

  /// The folder beside a configuration file: "/etc/dmu-xen.toml" has "/etc/dmu-xen/hooks".
  init(configurationPath: String) {
    let stem =
      configurationPath.hasSuffix(Self.suffix)
      ? String(configurationPath.dropLast(Self.suffix.count)) : configurationPath
    path = stem + "/hooks"
  }

  /// Path of a scheme's hook.
  func path(_ scheme: String) -> String { "\(path)/\(scheme)" }

  /// The schemes that have a hook, or what may be one.
  func schemes() throws(IOError) -> [String] {
    try Folder.names(path).filter { Source.isMeant($0 + "//") && $0 != "events" }.sorted()
  }

  /// The hook of a source, which may be run. Throws why it may not.
  func program(for source: Source) throws(DiskFailure) -> String {
    let program = path(source.scheme)
    guard access(program, F_OK) == 0 else {
      let known: [String]
      do throws(IOError) { known = try schemes() } catch { throw .hookless(source, program, []) }
      throw .hookless(source, program, known)
    }
    try HookFolder.check(program, in: path)
    return program
  }

  /// The hooks for events, in the order of their names, without hidden files, and why others may
  /// not be run.
  func events() throws(IOError) -> (programs: [String], refused: [DiskFailure]) {
    let folder = path + "/events.d"
    var programs: [String] = []
    var refused: [DiskFailure] = []
    for name in try Folder.names(folder).sorted() where name.first != "." {
      let program = "\(folder)/\(name)"
      do throws(DiskFailure) {
        try HookFolder.check(program, in: folder)
        programs.append(program)
      } catch { refused.append(error) }
    }
    return (programs, refused)
  }

  /// Throws unless a program and its folder are root's, or this process's user's, and nobody else
  /// may write to them.
  static func check(_ program: String, in folder: String) throws(DiskFailure) {
    for path in [folder, program] {
      var status = stat()
      guard stat(path, &status) == 0 else { throw DiskFailure(.last("examine", path)) }
      guard status.st_uid == 0 || status.st_uid == geteuid() else {
        throw .hookForeign(path, "its owner is user \(status.st_uid)", "chown root \(path)")
      }
      guard status.st_mode & 0o022 == 0 else {
        let mode = String(status.st_mode & 0o7777, radix: 8)
        throw .hookForeign(path, "its mode is 0\(mode)", "chmod go-w \(path)")
      }
    }
    var status = stat()
    guard stat(program, &status) == 0, status.st_mode & S_IFMT == S_IFREG,
      access(program, X_OK) == 0
    else {
      throw DiskFailure(
        .source, "the hook \(program) is not a program: chmod 755 \(program), or remove it")
    }
  }
}

extension DiskFailure {
  static func hookless(_ source: Source, _ program: String, _ known: [String]) -> DiskFailure {
    let hint = NearestMatch.hint(for: source.scheme, among: known)
    return DiskFailure(
      .source,
      "source \(source) cannot be had: there is no hook \(program)\(hint): install it, or correct"
        + " the spec")
  }

  static func hookForeign(_ path: String, _ why: String, _ remedy: String) -> DiskFailure {
    DiskFailure(
      .source,
      "\(path) may be changed by others than root (\(why)), so that no hook of it is run: \(remedy)"
    )
  }
}
