// SPDX-License-Identifier: Apache-2.0
// Where formats of others come from: shared libraries in a folder that only root can have put
// them into. A plugin is code in a process that may be root's.
//
// Invariants: what is loaded is what was looked at, since it is opened first and loaded by its
// descriptor; a library stays loaded.

import BlockIO
import DiskFormats
import Glibc
import SystemIO
import WorkerLink

/// Finds and loads plugins.
enum PluginFolder {
  /// Where they are unless somebody says otherwise.
  static let usual = "/usr/lib/dmu-xen/plugins"

  /// Whether there is a file for a plugin of that name.
  static func has(_ name: String, in folder: String) -> Bool {
    isName(name) && access(path(name, folder), F_OK) == 0
  }

  /// The names of the plugins in a folder, for a shell to complete; none where it may not be
  /// listed.
  static func names(in folder: String) -> [String] {
    Folder.paths(beginning: folder + "/").filter { $0.hasSuffix(".so") }
      .map { String($0.dropFirst(folder.count + 1).dropLast(3)) }.filter(isName)
  }

  /// Loads NAME.so and returns the address of its `dmu_plugin`.
  static func load(
    _ name: String, from folder: String
  ) throws(WorkerError) -> UnsafeMutableRawPointer {
    guard isName(name) else { throw WorkerError(.plugin, "'\(name)' cannot be a plugin's name") }
    let path = path(name, folder)
    let directory = try system { () throws(IOError) in
      try Descriptor(path: folder, flags: O_RDONLY | O_DIRECTORY)
    }
    try check(directory.raw, folder)
    let file = try system { () throws(IOError) in
      // Without waiting: nothing says yet that it is a regular file.
      try Descriptor(path: path, flags: O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
    }
    try check(file.raw, path)
    if let kind = FileStore.unusableKind(of: "/proc/self/fd/\(file.raw)") {
      throw WorkerError(.plugin, "plugin \(path) is \(kind): put the shared library there")
    }
    guard let library = dlopen("/proc/self/fd/\(file.raw)", RTLD_NOW | RTLD_LOCAL),
      let entry = dlsym(library, "dmu_plugin")
    else {
      let reason = dlerror().map { String(cString: $0) } ?? "no reason given"
      throw WorkerError(.plugin, "plugin \(path) cannot be loaded: \(reason)")
    }
    return entry
  }

  /// A word that is no path.
  private static func isName(_ name: String) -> Bool {
    !name.isEmpty
      && name.utf8.allSatisfy {
        (0x30...0x39).contains($0) || (0x61...0x7a).contains($0 | 0x20) || $0 == 0x2d
          || $0 == 0x5f
      }
  }

  private static func path(_ name: String, _ folder: String) -> String {
    folder + "/" + name + ".so"
  }

  /// Throws unless only root (or, where this is not root's process, its own user) can have
  /// written to it.
  private static func check(_ raw: Int32, _ path: String) throws(WorkerError) {
    var status = stat()
    guard fstat(raw, &status) == 0 else { throw WorkerError(IOError.last("examine", path)) }
    let others = mode_t(S_IWGRP | S_IWOTH)
    guard status.st_uid == 0 || status.st_uid == geteuid(), status.st_mode & others == 0 else {
      throw WorkerError(
        .plugin,
        "\(path) is not safe to load from: it must belong to root and be writable to root only"
          + " (chown root, chmod go-w)")
    }
  }
}

extension FormatName {
  /// The names of the plugins in a folder; nil: in the usual one.
  package static func plugins(in folder: String?) -> [String] {
    PluginFolder.names(in: folder ?? PluginFolder.usual)
  }
}
