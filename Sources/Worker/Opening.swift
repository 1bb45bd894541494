// What the daemon does for a supervised worker and a worker by hand does for itself: finding
// and opening the store and whatever files it names, and locking all of them.

import Glibc
import ImageFormats
import Posix

/// Stores opened by their paths.
enum Opening {
  /// Opens an image by the path of its store. `request.basePath` is the base, unless the
  /// image shall say it itself.
  static func image(
    _ name: FormatName, store path: String, _ request: ImageRequest
  ) throws(WorkerError) -> OpenImage {
    try imaging { () throws(ImageError) in
      let store = try open(path, as: "store", writable: !request.readOnly) {
        name.kind == .dscow
          ? "make it with 'dscow_tool -c \(path) BASE'"
          : "make it with 'qemu-img create -f \(name.kind.rawValue)'"
      }
      if !request.isLocked { try lock(store, as: "store", writable: !request.readOnly) }
      // A file may be named more than once: a lock of its own would be in the way.
      var files: [FileRequest: FileStore] = [:]
      return try OpenImage(name, store: store, request) { file throws(ImageError) in
        if let found = files[file] { return found }
        let role = file.role == .base ? "base" : "\(file.role.rawValue) of store \(path)"
        let found = try open(file.path, as: role, writable: file.writable) {
          file.role == .base ? "put it back, or say with --base where it is" : "put it back"
        }
        guard try !Dscow.same(store, found) else {
          throw ImageError(.corrupt, "store \(path) is, through others, its own base")
        }
        if !request.isLocked { try lock(found, as: role, writable: file.writable) }
        files[file] = found
        return found
      }
    }
  }

  /// Opens a store by a plugin, and the base if one is given.
  static func image(
    plugin name: String, in folder: String, store path: String, _ request: ImageRequest
  ) throws(WorkerError) -> OpenImage {
    guard PluginFolder.has(name, in: folder) else {
      throw FormatName.unknown(name, ", and no plugin \(folder)/\(name).so")
    }
    let entry = try PluginFolder.load(name, from: folder)
    return try imaging { () throws(ImageError) in
      let store = try open(path, as: "store", writable: !request.readOnly) { "make it first" }
      try lock(store, as: "store", writable: !request.readOnly)
      var devices: [any ByteStore] = [store]
      if let base = request.basePath {
        let file = try open(base, as: "base", writable: false) { "put it back" }
        try lock(file, as: "base", writable: false)
        devices.append(
          try ImageChain.base(
            file, kind: request.baseFormat?.kind ?? .raw, of: store
          ) { asked throws(ImageError) in
            throw ImageError(
              .unsupported, "base \(asked.from) names \(asked.path): a plugin's base has no base")
          })
      }
      let format = try PluginFormat(
        entry: entry, name: name, store: store, base: devices.count > 1 ? devices[1] : nil,
        writable: !request.readOnly)
      return OpenImage(
        name, format, store: store, devices: format.devices ?? devices,
        readOnly: request.readOnly)
    }
  }

  private static func open(
    _ path: String, as role: String, writable: Bool, remedy: () -> String
  ) throws(ImageError) -> FileStore {
    do throws(IOError) {
      return try FileStore(path: path, writable: writable)
    } catch {
      throw ImageFile.failure(error, toOpen: path, as: role, ifMissing: remedy())
    }
  }

  private static func lock(
    _ store: FileStore, as role: String, writable: Bool
  ) throws(ImageError) {
    do throws(IOError) {
      try store.lock(exclusive: writable)
    } catch {
      guard error.code == EAGAIN else { throw ImageError(error) }
      throw ImageError(
        .badRequest,
        "\(role) \(store.name) is in use by another program: end that one first, or choose another",
        cause: error)
    }
    if writable { try ImageFile.refusePending(store) }
  }
}
